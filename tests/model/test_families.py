"""Every family against `transformers`: random weights through a directory, both ways."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from abf.diffusion.config import LossConfig, MaskedCorruption
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.loss import block_charges
from abf.eval.flops import active_parameters
from abf.model.attention import CacheAttend
from abf.model.cache import KVCache
from abf.model.config import ModelConfig
from abf.model.families import gpt2
from abf.model.huggingface import load_hf, save_hf
from abf.model.store import load_model, save_model
from abf.model.transformer import Transformer
from tests.diffusion.rows import make_batch
from tests.model.test_transformer import IDS, LLAMA3, SHAPE, M, V, logits, theirs

torch.set_num_threads(1)

GROUPED = SHAPE | {"num_key_value_heads": 2}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 24,
    "beta_fast": 4.0,  # with the defaults every pair of so small a head would be slowed
}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 3.0}
GPT2 = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 48,
    "bos_token_id": 2,
    "eos_token_id": 2,
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, biases": ("llama", GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "llama, linear scaling": ("llama", GROUPED | {"rope_parameters": LINEAR}),
    "smollm": ("llama", GROUPED | {"tie_word_embeddings": True, "rope_theta": 1e5}),
    "llama 3": ("llama", GROUPED | {"rope_parameters": LLAMA3}),
    # More positions than the window that an export would have if it did not say that it has none.
    "mistral": (
        "mistral",
        GROUPED | {"head_dim": 12, "sliding_window": None, "max_position_embeddings": 8192},
    ),
    "mistral, window": ("mistral", GROUPED | {"sliding_window": M}),
    "qwen2": ("qwen2", GROUPED | {"tie_word_embeddings": True}),
    "qwen2, yarn": ("qwen2", GROUPED | {"rope_parameters": YARN}),
    "qwen2, window": (
        "qwen2",
        GROUPED | {"use_sliding_window": True, "sliding_window": M, "max_window_layers": 1},
    ),
    "qwen3": ("qwen3", GROUPED | {"head_dim": 20, "tie_word_embeddings": True}),
    "qwen3, biases, yarn": (
        "qwen3",
        GROUPED
        | {"head_dim": 12, "attention_bias": True}
        | {"rope_parameters": YARN | {"mscale": 0.7, "mscale_all_dim": 0.2, "truncate": False}},
    ),
    "gpt2": ("gpt2", GPT2),
    "gpt2, untied, narrow": ("gpt2", GPT2 | {"tie_word_embeddings": False, "n_inner": 72}),
}


def random_model(family: str, settings: dict[str, Any]) -> Any:
    """Weights so large that attention, biases, norms and positions all matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2 or name.endswith("bias"):
                parameter.normal_(0.0, 0.3)
            else:
                assert "norm" in name or "ln_" in name
                parameter.uniform_(0.5, 1.5)
    return model.eval()


@pytest.fixture(params=VARIANTS)
def source(request, tmp_path) -> Any:
    """A model of `transformers`; `tmp_path`/theirs holds it."""
    model = random_model(*VARIANTS[request.param])
    model.save_pretrained(tmp_path / "theirs")
    return model


def same(a: torch.Tensor, b: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert b.abs().max() > 1
    torch.testing.assert_close(a, b, rtol=1e-4, atol=tolerance)


def test_the_weights_of_these_tests_make_order_matter():
    """A model that ignored positions would fail: permuting the context changes the last logits."""
    for name, (family, settings) in VARIANTS.items():
        model = random_model(family, settings)
        swapped = IDS.clone()
        swapped[:, [3, 30]] = swapped[:, [30, 3]]
        assert (theirs(model, swapped) - theirs(model, IDS))[:, -1].abs().max() > 0.05, name


def test_a_directory_gives_the_same_logits(tmp_path, source):
    same(logits(load_hf(tmp_path / "theirs"), IDS), theirs(source, IDS))


def test_shards_give_the_same_weights(tmp_path, source):
    source.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    whole, parts = load_hf(tmp_path / "theirs"), load_hf(tmp_path / "sharded")
    equal(whole, parts)


def equal(a: Transformer, b: Transformer) -> None:
    assert a.config == b.config
    state, found = a.state_dict(), b.state_dict()
    assert state.keys() == found.keys()
    assert all(torch.equal(state[name], found[name]) for name in state)


@pytest.mark.parametrize("shard", [5_000_000_000, 20_000])
def test_the_export_loads_in_transformers_as_the_same_model(tmp_path, source, shard):
    model = load_hf(tmp_path / "theirs")
    save_hf(model, tmp_path / "ours", max_shard_bytes=shard)
    assert (len(list((tmp_path / "ours").glob("*.safetensors"))) > 2) == (shard < 1e6)
    loaded: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    read, info = loaded
    assert not any(info.values()), info
    assert type(read) is type(source)
    assert read.dtype == torch.float32
    wanted = source.state_dict()
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read.state_dict().items())
    same(theirs(read.eval(), IDS), theirs(source, IDS), 1e-6)
    equal(load_hf(tmp_path / "ours"), model)


def test_the_model_directory_keeps_the_options(tmp_path, source):
    model = load_hf(tmp_path / "theirs")
    save_model(model, tmp_path / "abf")
    read = load_model(tmp_path / "abf")
    equal(read, model)
    assert torch.equal(read.rope, model.rope)


def test_cached_passes_give_the_same_logits(tmp_path, source):
    """Prefix, then a block each; one request is at the end of its context while another has many
    new rows, so that rows of padding lie beyond the last position."""
    model = load_hf(tmp_path / "theirs")
    cache = KVCache(model.config, 2, capacity=4)
    wanted = theirs(source, IDS)
    starts = torch.tensor([0, 0])
    for lengths in (torch.tensor([M - 1, 7]), torch.tensor([1, 15])):
        ids = torch.zeros(2, int(lengths.max()), dtype=torch.int64)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            ids[row, :length] = IDS[row, start : start + length]
        attend = CacheAttend(cache, query_lengths=lengths, own="causal", backend="tiles")
        positions = starts[:, None] + torch.arange(ids.shape[1])
        with torch.no_grad():
            found = model.logits(model.hidden(ids, positions, attend))
        cache.commit(lengths)
        for row, (start, length) in enumerate(zip(starts, lengths, strict=True)):
            same(found[row, :length], wanted[row, start : start + length])
        starts = starts + lengths


def test_every_option_computes_in_one_dtype_under_autocast(tmp_path, source):
    """Keys, queries and values reach the seam and a bfloat16 cache alike, whatever norms return."""
    model = load_hf(tmp_path / "theirs")
    cache = KVCache(model.config, 2, dtype=torch.bfloat16)
    attend = CacheAttend(cache, query_lengths=torch.tensor([M, M]), own="causal", backend="tiles")
    positions = torch.arange(M).expand_as(IDS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found = model.logits(model.hidden(IDS, positions, attend)).float()
    wanted = theirs(source, IDS)
    assert 0 < (found - wanted).norm() < 0.1 * wanted.norm()


def test_training_reaches_every_weight(tmp_path, source):
    model = load_hf(tmp_path / "theirs")
    batch = make_batch([[[1, 3, 2, 4], [2, 5]], [[5, 1, 1], [3, 6, 2]]], 26)
    batch = replace(batch, token_ids=batch.token_ids % V)
    corruption = build_corruption(MaskedCorruption(), mask_id=model.mask_id)
    noised = corruption.apply(batch, seed=0, epochs=np.zeros(2, dtype=np.int64))
    terms = ("nelbo", "ar", "length")
    charges = block_charges(model, batch, noised, loss=LossConfig(), backend="tiles", terms=terms)
    sum(charges[term].sum for term in terms).backward()
    assert not [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]


# what is special in one family -----------------------------------------------------------------


def imported(path: Path, family: str, settings: dict[str, Any]) -> tuple[Any, Transformer]:
    source = random_model(family, settings)
    source.save_pretrained(path)
    return source, load_hf(path)


def test_gpt2_is_the_same_to_the_last_digits_in_float64(tmp_path):
    """Of these families only GPT-2's code computes in float64 throughout."""
    source, model = imported(tmp_path, "gpt2", GPT2)
    torch.testing.assert_close(
        logits(model.double(), IDS), theirs(source.double(), IDS), rtol=1e-11, atol=1e-11
    )


def test_old_gpt2_checkpoints_of_the_bare_model_with_their_masks(tmp_path):
    _, model = imported(tmp_path, "gpt2", GPT2)
    path = tmp_path / "model.safetensors"
    weights = {name.removeprefix("transformer."): w for name, w in load_file(path).items()}
    for number in range(3):
        weights[f"h.{number}.attn.bias"] = torch.ones(1, 1, 48, 48).tril()
        weights[f"h.{number}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(weights, path, metadata={"format": "pt"})
    equal(load_hf(tmp_path), model)


def test_rotary_tables_of_old_checkpoints_are_dropped(tmp_path):
    _, model = imported(tmp_path, "llama", GROUPED)
    path = tmp_path / "model.safetensors"
    tables = {f"model.layers.{n}.self_attn.rotary_emb.inv_freq": torch.ones(4) for n in range(3)}
    save_file(load_file(path) | tables, path, metadata={"format": "pt"})
    equal(load_hf(tmp_path), model)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_read_as_float32(tmp_path, dtype):
    source = random_model("gpt2", GPT2).to(dtype)
    source.save_pretrained(tmp_path)
    model = load_hf(tmp_path)
    assert all(tensor.dtype == torch.float32 for tensor in model.state_dict().values())
    fused = source.transformer.h[1].attn.c_attn.weight.detach().float()
    assert torch.equal(model.get_parameter("layers.1.attention.k.weight"), fused[:, 32:64].T)


@pytest.mark.parametrize("variant", ["mistral, window", "qwen2, window"])
def test_a_sliding_window_bounds_the_context(tmp_path, variant):
    """Beyond its window the source is another model, so no longer sequence may be asked for."""
    source, model = imported(tmp_path, *VARIANTS[variant])
    assert model.config.max_positions == M < source.config.max_position_embeddings
    ids = torch.randint(V, (1, M + 20), generator=torch.Generator().manual_seed(2))
    difference = (logits(model, ids) - theirs(source, ids)).abs().amax(dim=(0, 2))
    assert difference[:M].max() < 1e-4
    assert difference[M:].min() > 1e-3


def test_a_window_of_no_layer_is_none(tmp_path):
    settings = GROUPED | {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 3}
    source, model = imported(tmp_path, "qwen2", settings)
    assert model.config.max_positions == source.config.max_position_embeddings
    same(logits(model, IDS), theirs(source, IDS))


@pytest.mark.parametrize("scaling", [LLAMA3, YARN])
def test_an_original_context_beside_the_scaling_or_nowhere(tmp_path, scaling):
    """Where `transformers` looks for it: in config.json itself, else the context."""
    imported(tmp_path, "llama", GROUPED | {"rope_parameters": scaling})
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]["original_max_position_embeddings"]
    for extra in ({"original_max_position_embeddings": 16}, {}):
        path.write_text(json.dumps(config | extra))
        read = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
        same(logits(load_hf(tmp_path), IDS), theirs(read, IDS))


def test_a_gpt2_from_scratch_has_norms_of_one_and_no_biases():
    config = ModelConfig.model_validate(
        {
            "family": "gpt2",
            "vocab_size": V,
            "d_model": 32,
            "layers": 2,
            "heads": 4,
            "kv_heads": 4,
            "head_dim": 8,
            "d_ff": 128,
            "max_positions": 48,
        }
        | gpt2.FAMILY.fixed
    )
    model = Transformer(config)
    model.initialise(torch.Generator().manual_seed(0))
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    norms = [p for name, p in model.named_parameters() if name.endswith("norm.weight")]
    assert len(norms) == 5
    assert all((p == 1).all() for p in norms)
    assert 0.015 < model.get_parameter("position_embedding.weight").std() < 0.025
    # 12 d^2 a layer (Kaplan et al., 2001.08361), and the head; positions are looked up.
    assert active_parameters(model) == 2 * 12 * 32**2 + V * 32
