"""Importing checkpoints and converting them, with `transformers` as the oracle."""

import json
import re
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from transformers import LlamaForCausalLM

from abf.artifacts import packed_schema
from abf.data.config import PackConfig
from abf.data.loader import PackedBatch, PackedRows
from abf.errors import ArtifactError
from abf.model import convert as convert_module
from abf.model.convert import convert, load_hf, load_model
from abf.model.hf_config import read_config
from tests.diffusion.rows import make_batch
from tests.model.test_families import GPT2, GROUPED, VARIANTS, random_model
from tests.model.test_transformer import LLAMA3, random_llama, theirs

L, V = 26, 257
PACK = PackConfig(row_length=L, max_block=6)


def edit_config(path: Path, **changes: object) -> None:
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


def write_packed(stage: Path, *, vocab_size: int = V) -> PackedBatch:
    """A pack stage directory with two held-out rows of several pieces and padding."""
    batch = make_batch([[[1, 3, 2, 4], [2, 5]], [[5, 1, 1], [3, 6, 2]]], L)
    metadata = {"row_length": L, "max_block": 6, "vocab_size": vocab_size, "document_id": 0}
    schema = packed_schema(L, {name: str(value) for name, value in metadata.items()})
    columns = (batch.token_ids, batch.block_id, batch.document_id)
    arrays = [
        pa.FixedSizeListArray.from_arrays(pa.array(c.ravel(), field.type.value_type), L)
        for c, field in zip(columns, schema, strict=True)
    ]
    (stage / "packed").mkdir(parents=True)
    with pa.ipc.new_file(stage / "packed" / "heldout.arrow", schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=schema))
    return PackedRows(stage / "packed" / "heldout.arrow").rows(np.arange(2))


@pytest.fixture
def source(tmp_path) -> LlamaForCausalLM:
    """`tmp_path`/stage/base holds it; `tmp_path`/pack real text packed with its vocabulary."""
    model = random_llama(
        vocab_size=V, num_key_value_heads=2, tie_word_embeddings=True, rope_parameters=LLAMA3
    )
    model.save_pretrained(tmp_path / "stage" / "base")
    return model


def test_conversion_is_an_identity_and_says_so(tmp_path, source):
    batch = write_packed(tmp_path / "pack")
    counts = convert(tmp_path / "stage", tmp_path / "pack", PACK, tmp_path / "out")
    identity = json.loads((tmp_path / "out" / "init" / "identity.json").read_text())
    assert counts == identity
    assert identity["tokens"] == 35
    assert identity["max_abs_diff"] < 1e-4
    nll = []
    for row in range(2):
        for number in np.unique(batch.document_id[row][batch.document_id[row] >= 0]):
            piece = torch.from_numpy(batch.token_ids[row][batch.document_id[row] == number])
            with torch.no_grad():
                loss = torch.nn.functional.cross_entropy(
                    theirs(source, piece[None])[0, :-1], piece[1:]
                )
            nll += [loss.item()] * (len(piece) - 1)
    assert identity["source_nll"] == pytest.approx(np.mean(nll), abs=1e-5)
    model = load_model(tmp_path / "out" / "init")
    assert model.config == read_config(tmp_path / "stage" / "base", max_block=6, document_id=0)
    assert not model.length_head.weight.any()
    torch.testing.assert_close(model.mask_embedding, model.embedding.weight.mean(0))


@pytest.mark.parametrize("variant", VARIANTS)
def test_conversion_is_an_identity_in_every_family(tmp_path, variant, capsys):
    """The clean stream beside a noisy one gives the source's log-probabilities, and what was
    mapped is printed."""
    family, settings = VARIANTS[variant]
    if settings.get("sliding_window"):
        settings = settings | {"sliding_window": L}
    source = random_model(family, settings | {"vocab_size": V})
    source.save_pretrained(tmp_path / "stage" / "base")
    write_packed(tmp_path / "pack")
    counts = convert(tmp_path / "stage", tmp_path / "pack", PACK, tmp_path / "out")
    assert counts["max_abs_diff"] < 1e-4
    model = load_model(tmp_path / "out" / "init")
    assert model.config.family == family
    first, *groups, new = capsys.readouterr().out.splitlines()
    names = [name for name, _ in source.named_parameters()]
    assert f"{type(source).__name__}, 3 layers, vocabulary {V}, context " in first
    size = sum(parameter.numel() for parameter in source.parameters())
    assert first.endswith(f"; {len(names)} tensors mapped, {size} parameters")
    patterns = {re.sub(r"\.\d+\.", ".*.", name) for name in names}
    assert {line.split(" -> ")[0].strip() for line in groups} == patterns
    assert new.startswith("  new: mask_embedding [32], length_head.weight [")


def test_the_fused_matrix_is_told_from_the_others(tmp_path, capsys):
    random_model("gpt2", GPT2 | {"vocab_size": V}).save_pretrained(tmp_path / "stage" / "base")
    write_packed(tmp_path / "pack")
    convert(tmp_path / "stage", tmp_path / "pack", PACK, tmp_path / "out")
    said = capsys.readouterr().out
    assert "context 48 (n_positions); 40 tensors mapped" in said
    ours = ", ".join(f"layers.*.attention.{part}.weight" for part in "qkv")
    assert f"  transformer.h.*.attn.c_attn.weight -> {ours} (3, transposed)\n" in said
    assert "  transformer.h.*.ln_1.weight -> layers.*.attention_norm.weight (3)\n" in said
    assert "  transformer.wpe.weight -> position_embedding.weight (1)\n" in said


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("mistral", {"sliding_window": 20}, r"context of 20 \(sliding_window in its config"),
        (
            "qwen2",
            {"use_sliding_window": True, "sliding_window": 20, "max_window_layers": 0}
            | {"layer_types": None},
            r"context of 20 \(sliding_window in",
        ),
        (
            "qwen3",
            {"sliding_window": 20, "layer_types": ["full_attention", "sliding_attention"] * 2},
            r"context of 20 \(sliding_window in",
        ),
        ("gpt2", {"n_positions": 20}, r"context of 20 \(n_positions in"),
    ],
)
def test_rows_longer_than_a_familys_context_are_refused(tmp_path, family, changes, message):
    """The key that bounds the context is named, sliding windows too."""
    write_packed(tmp_path / "pack")
    settings = (GPT2 if family == "gpt2" else GROUPED) | {"vocab_size": V}
    random_model(family, settings).save_pretrained(tmp_path / "stage" / "base")
    edit_config(tmp_path / "stage" / "base", **changes)
    with pytest.raises(ArtifactError, match=f"rows of 26 tokens.*{message}"):
        convert(tmp_path / "stage", tmp_path / "pack", PACK, tmp_path / "out")


def test_a_tokenizer_that_does_not_match_the_checkpoint(tmp_path, source):
    write_packed(tmp_path / "pack", vocab_size=300)
    with pytest.raises(ArtifactError, match=r"does not match.*300 token ids.*has 257"):
        convert(tmp_path / "stage", tmp_path / "pack", PACK, tmp_path / "out")


def test_rows_longer_than_the_context_are_refused(tmp_path, source):
    write_packed(tmp_path / "pack")
    path = tmp_path / "stage" / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 16}))
    with pytest.raises(
        ArtifactError, match=r"rows of 26 tokens.*context of 16 \(max_position_embeddings in"
    ):
        convert(tmp_path / "stage", tmp_path / "pack", PACK, tmp_path / "out")


@pytest.mark.parametrize("value", [1e-2, float("nan")])
def test_a_conversion_that_changes_the_model_is_refused(tmp_path, source, monkeypatch, value):
    write_packed(tmp_path / "pack")

    def damaged(*args, **kwargs):
        model = load_hf(*args, **kwargs)
        with torch.no_grad():
            model.get_parameter("layers.1.mlp_norm.weight").add_(value)
        return model

    monkeypatch.setattr(convert_module, "load_hf", damaged)
    with pytest.raises(ArtifactError, match="the converted model is not its source"):
        convert(tmp_path / "stage", tmp_path / "pack", PACK, tmp_path / "out")
    assert not (tmp_path / "out" / "init").exists()


@pytest.mark.parametrize("every", [False, True], ids=["one token", "all"])
def test_a_source_without_log_probabilities_is_refused(tmp_path, every):
    """A NaN of the source compares with nothing; it must not leave the comparison either."""
    batch = write_packed(tmp_path / "pack")
    source = random_llama(vocab_size=V, tie_word_embeddings=False)
    with torch.no_grad():
        broken = slice(None) if every else batch.token_ids[batch.token_ids > 0].max()
        source.model.embed_tokens.weight[broken] = float("nan")
    source.save_pretrained(tmp_path / "stage" / "base")
    with pytest.raises(ArtifactError, match=r"on 35 held-out tokens .* differ by up to nan"):
        convert(tmp_path / "stage", tmp_path / "pack", PACK, tmp_path / "out")
