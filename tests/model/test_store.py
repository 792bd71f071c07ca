"""ABF model directories: what is written is read, and damage is named."""

import json

import pytest
import torch

from abf.errors import ArtifactError
from abf.model.config import ShapeConfig
from abf.model.store import load_model, load_weights, new_model, save_model, save_weights
from tests.diffusion.rows import tiny_model


@pytest.fixture
def model():
    return tiny_model(dtype=torch.float32)


def test_a_model_comes_back_bit_by_bit(tmp_path, model):
    save_model(model, tmp_path / "init")
    read = load_model(tmp_path / "init")
    assert read.config == model.config
    state, found = model.state_dict(), read.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], found[name]) for name in state)
    assert torch.equal(read.rope, model.rope)
    assert all(parameter.requires_grad for parameter in read.parameters())
    assert oct((tmp_path / "init" / "model.safetensors").stat().st_mode) == oct(
        (tmp_path / "init" / "model_config.json").stat().st_mode
    )


def test_random_weights_are_as_wide_as_the_shape_says():
    shape = ShapeConfig(d_model=64, layers=8, heads=4, kv_heads=4, d_ff=128, init_std=0.08)
    made = new_model(shape, vocab_size=300, document_id=0, max_block=8, max_positions=64, seed=0)
    for name, weight in made.state_dict().items():
        wanted = 0.08 / 4 if name.endswith(("attention.o.weight", "mlp.down.weight")) else 0.08
        if weight.dim() == 2 and not name.startswith("length_head"):
            assert float(weight.std()) == pytest.approx(wanted, rel=0.05), name


def test_weights_do_not_depend_on_the_file_once_read(tmp_path, model):
    save_model(model, tmp_path)
    read = load_model(tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    assert torch.equal(read.embedding.weight, model.embedding.weight)


def test_a_truncated_file_is_named(tmp_path, model):
    save_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ArtifactError, match=r"model\.safetensors cannot be read .*truncated"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model_config.json"])
def test_a_missing_file_is_named(tmp_path, model, name):
    save_model(model, tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(ArtifactError, match=f"{name} is missing"):
        load_model(tmp_path)


def test_tensors_that_do_not_fit_are_named(tmp_path, model):
    save_model(model, tmp_path)
    path = tmp_path / "model.safetensors"
    weights = load_weights(path)
    for changed, message in [
        ({"norm.weight": None}, r"lacks tensor norm\.weight, \[24\]"),
        ({"rumour": torch.zeros(2)}, "holds tensor rumour"),
        (
            {"mask_embedding": torch.zeros(3)},
            r"mask_embedding has shape \[3\], the configuration says \[24\]",
        ),
    ]:
        kept = {name: tensor for name, tensor in weights.items() if name not in changed}
        save_weights(kept | {n: t for n, t in changed.items() if t is not None}, path)
        with pytest.raises(ArtifactError, match=message):
            load_model(tmp_path)


def test_an_impossible_configuration_is_refused(tmp_path, model):
    save_model(model, tmp_path)
    path = tmp_path / "model_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"kv_heads": 3}))
    with pytest.raises(ArtifactError, match=r"heads \(4\) must be a multiple"):
        load_model(tmp_path)
