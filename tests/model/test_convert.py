"""Importing checkpoints and converting them, with `transformers` as the oracle."""

import json
import shutil
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
from abf.model.config import ImportedBase
from abf.model.convert import convert, import_checkpoint, load_hf, load_model
from abf.model.huggingface import read_config
from tests.diffusion.rows import make_batch
from tests.model.test_transformer import LLAMA3, random_llama, theirs

L, V = 26, 257
PACK = PackConfig(row_length=L, max_block=6)


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


# convert -------------------------------------------------------------------------------------


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


def test_a_tokenizer_that_does_not_match_the_checkpoint(tmp_path, source):
    write_packed(tmp_path / "pack", vocab_size=300)
    with pytest.raises(ArtifactError, match=r"does not match.*300 token ids.*has 257"):
        convert(tmp_path / "stage", tmp_path / "pack", PACK, tmp_path / "out")


def test_rows_longer_than_the_context_are_refused(tmp_path, source):
    write_packed(tmp_path / "pack")
    path = tmp_path / "stage" / "base" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"max_position_embeddings": 16}))
    with pytest.raises(ArtifactError, match=r"rows of 26 tokens.*context of 16"):
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


# import a directory --------------------------------------------------------------------------


def directory(path: Path) -> ImportedBase:
    return ImportedBase.model_validate({"checkpoint": {"kind": "directory", "path": str(path)}})


@pytest.fixture
def checkpoint(tmp_path, source) -> Path:
    path = tmp_path / "stage" / "base"
    (path / "tokenizer.json").write_text("{}")
    return path


def edit_config(path: Path, **changes: object) -> None:
    config = path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | changes))


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

    missing = next(path.glob("model-00002*"))
    missing.rename(tmp_path / "elsewhere")
    with pytest.raises(ArtifactError, match=rf"{missing.name} is missing, but the index"):
        import_checkpoint(directory(path), tmp_path / "again")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MambaForCausalLM"]}, "architecture 'MambaForCausalLM' is not known"),
        ({"attention_bias": True}, "attention_bias=True is not supported"),
        ({"mlp_bias": True}, "mlp_bias=True is not supported"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not supported"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type 'yarn' is not supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
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
    config.write_text("{")
    with pytest.raises(ArtifactError, match=r"config\.json is not JSON"):
        import_checkpoint(directory(checkpoint), tmp_path / "d")
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
    from safetensors.torch import load_file, save_file

    path = checkpoint / "model.safetensors"
    weights = load_file(path)
    head = weights["model.embed_tokens.weight"].clone()
    save_file(weights | {"lm_head.weight": head}, path, metadata={"format": "pt"})
    import_checkpoint(directory(checkpoint), tmp_path / "out")
    save_file(weights | {"lm_head.weight": head + 1}, path, metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match=r"lm_head\.weight differs"):
        import_checkpoint(directory(checkpoint), tmp_path / "again")
