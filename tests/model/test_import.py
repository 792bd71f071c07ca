"""Importing directories: what is taken over whole, and what is refused by name."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from abf.errors import ArtifactError
from abf.model.config import ImportedBase
from abf.model.convert import import_checkpoint, load_hf
from tests.model.test_convert import edit_config
from tests.model.test_families import GPT2, GROUPED, random_model
from tests.model.test_transformer import V, random_llama

TIED = {"num_key_value_heads": 2, "tie_word_embeddings": True}


@pytest.fixture
def source(tmp_path) -> LlamaForCausalLM:
    """`tmp_path`/stage/base holds it."""
    model = random_llama(**TIED)
    model.save_pretrained(tmp_path / "stage" / "base")
    return model


def directory(path: Path) -> ImportedBase:
    return ImportedBase.model_validate({"checkpoint": {"kind": "directory", "path": str(path)}})


@pytest.fixture
def checkpoint(tmp_path, source) -> Path:
    path = tmp_path / "stage" / "base"
    (path / "tokenizer.json").write_text("{}")
    return path


def test_a_fault_names_the_folder_that_the_user_gave(tmp_path, checkpoint):
    edit_config(checkpoint, num_hidden_layers=2)
    with pytest.raises(ArtifactError) as caught:
        import_checkpoint(directory(checkpoint), tmp_path / "out")
    assert str(caught.value).startswith(f"{checkpoint} holds tensor model.layers.2.")
    assert "save it again without adapters" in str(caught.value)
    assert not (tmp_path / "out" / "base").exists()


def test_a_directory_is_copied_whole(tmp_path, checkpoint, source):
    counts = import_checkpoint(directory(checkpoint), tmp_path / "out")
    assert counts["parameters"] == sum(p.numel() for p in source.parameters())
    assert counts["vocab_size"] == V
    shutil.rmtree(checkpoint)
    read = LlamaForCausalLM.from_pretrained(tmp_path / "out" / "base")
    for name, parameter in source.named_parameters():
        assert torch.equal(read.get_parameter(name), parameter)
    assert (tmp_path / "out" / "base" / "tokenizer.json").exists()


def test_shards_with_an_index(tmp_path, source):
    path = tmp_path / "sharded"
    source.save_pretrained(path, max_shard_size="20KB")
    (path / "tokenizer.json").write_text("{}")
    assert len(list(path.glob("*.safetensors"))) > 2
    import_checkpoint(directory(path), tmp_path / "out")
    model = load_hf(tmp_path / "out" / "base")
    assert torch.equal(model.embedding.weight, source.model.embed_tokens.weight)

    first, missing = (next(path.glob(f"model-0000{number}*")) for number in (1, 2))
    twice = load_file(missing)
    name, tensor = next(iter(load_file(first).items()))
    before = missing.read_bytes()
    save_file(twice | {name: tensor + 1}, missing)
    with pytest.raises(ArtifactError, match=rf"{missing.name} holds tensor {name}, as another"):
        load_hf(path)
    missing.write_bytes(before)
    missing.rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=rf"{missing.name} is missing, but the index"):
        import_checkpoint(directory(path), tmp_path / "again")


def rope(**parameters: object) -> dict[str, object]:
    return {"rope_parameters": parameters}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture 'MambaForCausalLM' is not known"),
        ({"architectures": None, "model_type": "mamba"}, "architecture 'mamba' is not known"),
        ({"architectures": ["SmolLM3ForCausalLM"]}, "'SmolLM3ForCausalLM' is not known"),
        ({"attention_bias": True}, r"lacks tensor model\.layers\.0\.self_attn\.k_proj\.bias"),
        ({"mlp_bias": True}, r"lacks tensor model\.layers\.0\.mlp\.down_proj\.bias"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported; only 'silu' is"),
        ({"quantization_config": {"bits": 4}}, r"quantization_config=\{'bits': 4\} is not supp"),
        (rope(rope_type="dynamic", factor=2.0), "rope_type 'dynamic' is not supported; supp.*yarn"),
        (rope(rope_type="longrope"), "rope_type 'longrope' is not supported"),
        (rope(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
        ({"partial_rotary_factor": 0.25}, "partial_rotary_factor=0.25 is not supported"),
        (rope(mrope_section=[1, 2]), "RoPE of type 'default' with 'mrope_section' is not supp"),
        (rope(rope_type="yarn"), "config.json lacks 'factor'"),
        (rope(rope_type="linear"), "describes no model of ours: factor: Field required$"),
        ({"rope_parameters": "yarn"}, "rope_scaling='yarn' is not supported; a mapping is"),
        (rope(rope_type="default", rope_theta="x"), "describes no model of ours: could not conv"),
        ({"architectures": {"a": 1}}, "architecture {'a': 1} is not known"),
        ({"architectures": "FalconForCausalLM"}, "architecture 'FalconForCausalLM' is not known"),
        ({"head_dim": None, "hidden_size": "32"}, "no model of ours: unsupported operand"),
        ({"num_hidden_layers": 4}, r"lacks tensor model\.layers\.3\."),
        ({"num_hidden_layers": 2}, r"holds tensor model\.layers\.2\."),
        ({"intermediate_size": 57}, r"mlp\.down_proj\.weight has shape \[32, 56\].*\[32, 57\]"),
        ({"tie_word_embeddings": False}, r"lacks tensor lm_head\.weight"),
        ({"num_key_value_heads": 3}, r"heads \(4\) must be a multiple"),
    ],
)
def test_what_this_model_has_not_is_refused_by_name(tmp_path, checkpoint, changes, message):
    edit_config(checkpoint, **changes)
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(directory(checkpoint), tmp_path / "out")


def test_missing_parts_of_a_directory_are_named(tmp_path, checkpoint):
    weights, config = checkpoint / "model.safetensors", checkpoint / "config.json"
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(ArtifactError, match=r"has no tokenizer\.json"):
        import_checkpoint(directory(checkpoint), tmp_path / "a")
    weights.rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(ArtifactError, match=r"pickled weights \(\.bin\) are not read"):
        import_checkpoint(directory(checkpoint), tmp_path / "b")
    stripped = json.loads(config.read_text())
    del stripped["hidden_size"]
    config.write_text(json.dumps(stripped))
    with pytest.raises(ArtifactError, match=r"config\.json lacks 'hidden_size'"):
        import_checkpoint(directory(checkpoint), tmp_path / "c")
    for text in ("{", "[" * 100_000):
        config.write_text(text)
        with pytest.raises(ArtifactError, match=r"config\.json is not JSON"):
            import_checkpoint(directory(checkpoint), tmp_path / "d")
    config.unlink()
    config.symlink_to(config)
    with pytest.raises(ArtifactError, match=r"config\.json cannot be read: Too many levels"):
        load_hf(checkpoint)
    with pytest.raises(ArtifactError, match="is no directory"):
        import_checkpoint(directory(tmp_path / "nowhere"), tmp_path / "e")


def test_a_checkpoint_cut_in_half_is_named(tmp_path, checkpoint):
    weights = checkpoint / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read"):
        import_checkpoint(directory(checkpoint), tmp_path / "out")


def test_an_index_cannot_point_outside_its_directory(tmp_path, checkpoint):
    index = {"weight_map": {"model.norm.weight": "../elsewhere.safetensors"}}
    (checkpoint / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArtifactError, match="points outside its directory"):
        import_checkpoint(directory(checkpoint), tmp_path / "out")


def test_a_tied_head_stored_twice_must_be_the_same(tmp_path, checkpoint, source):
    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    import_checkpoint(directory(checkpoint), tmp_path / "out")
    save_file(weights | {"lm_head.weight": head + 1}, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lm_head\.weight differs"):
        import_checkpoint(directory(checkpoint), tmp_path / "again")


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("gpt2", {"activation_function": "gelu"}, "activation_function='gelu' is not supported"),
        (
            "gpt2",
            {"scale_attn_by_inverse_layer_idx": True},
            "scale_attn_by_inverse_layer_idx=True is not supported",
        ),
        ("gpt2", {"n_positions": 50}, r"wpe\.weight has shape \[48, 32\].*\[50, 32\]"),
        ("gpt2", {"n_inner": 64}, r"mlp\.c_fc\.bias has shape \[128\].*\[64\]"),
        (
            "qwen3",
            {"architectures": ["Qwen2ForCausalLM"]},
            r"holds tensor .*0\.self_attn\.k_norm\.weight, which Qwen2",
        ),
        (
            "qwen2",
            {"architectures": ["MistralForCausalLM"]},
            r"holds tensor .*k_proj\.bias, which Mi",
        ),
        ("qwen3", {"head_dim": 12}, r"k_norm\.weight has shape \[8\], config\.json says \[12\]"),
    ],
)
def test_a_directory_that_contradicts_its_family_is_refused(tmp_path, family, changes, message):
    settings = GPT2 if family == "gpt2" else GROUPED | {"head_dim": 8}
    random_model(family, settings).save_pretrained(tmp_path)
    edit_config(tmp_path, **changes)
    with pytest.raises(ArtifactError, match=message):
        load_hf(tmp_path)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("model.rumour.weight", torch.ones(2), r"holds tensor model\.rumour\.weight, which Llama"),
        (
            "model.norm.weight",
            torch.ones(32, dtype=torch.int8),
            r"model\.norm\.weight is torch\.int8",
        ),
    ],
)
def test_a_tensor_of_another_kind_is_named(tmp_path, checkpoint, name, tensor, message):
    path = checkpoint / "model.safetensors"
    save_file(load_file(path) | {name: tensor}, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=message):
        import_checkpoint(directory(checkpoint), tmp_path / "out")
