"""The transformer against `transformers` on random weights, both ways through a directory."""

import contextlib
import json
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from abf.diffusion.layout import clean_ranges
from abf.model.attention import RangeAttend
from abf.model.config import ShapeConfig
from abf.model.huggingface import load_hf, save_hf
from abf.model.store import new_model
from abf.model.transformer import Transformer
from abf.train.recompute import recomputed
from tests.diffusion.rows import make_batch, tiny_model

torch.set_num_threads(1)

V, M = 61, 40
SHAPE = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 56,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
VARIANTS = {
    "multi-head, untied": {"tie_word_embeddings": False},
    "grouped, tied": {"num_key_value_heads": 2, "tie_word_embeddings": True},
    "one kv head, wide heads": {"num_key_value_heads": 1, "head_dim": 20},
    "rope base": {"rope_theta": 500000.0, "num_key_value_heads": 2},
    "llama3 scaling": {"rope_parameters": LLAMA3, "tie_word_embeddings": True},
}


def random_llama(seed: int = 0, **changes: object) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig.from_dict(SHAPE | changes))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.3)
            else:  # norm weights of exactly one would hide a missing or swapped norm
                assert "norm" in name
                parameter.uniform_(0.5, 1.5)
    return model.eval()


def logits(model: Transformer, ids: torch.Tensor) -> torch.Tensor:
    """Causal logits of whole rows, [B, M, V]."""
    ranges = torch.zeros(*ids.shape, 4, dtype=torch.int64)
    ranges[..., 1] = torch.arange(ids.shape[1]) + 1
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    with torch.no_grad():
        return model.logits(model.hidden(ids, positions, model.attend(ranges, backend="reference")))


def theirs(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(ids).logits


IDS = torch.randint(V, (2, M), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_transformers_directory_gives_the_same_logits(tmp_path, variant):
    source = random_llama(**VARIANTS[variant])
    source.save_pretrained(tmp_path)
    torch.testing.assert_close(
        logits(load_hf(tmp_path), IDS), theirs(source, IDS), rtol=1e-4, atol=2e-5
    )


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_we_write_transformers_reads_with_the_same_logits(tmp_path, variant):
    random_llama(**VARIANTS[variant]).save_pretrained(tmp_path / "theirs")
    model = load_hf(tmp_path / "theirs")
    save_hf(model, tmp_path / "ours")
    loaded: Any = LlamaForCausalLM.from_pretrained(tmp_path / "ours", output_loading_info=True)
    read, info = loaded
    assert not any(info.values()), info
    assert read.dtype == torch.float32
    assert read.config.tie_word_embeddings == model.config.tie_embeddings
    torch.testing.assert_close(theirs(read.eval(), IDS), logits(model, IDS), rtol=1e-4, atol=2e-5)


def test_old_keys_of_rope_are_read_too(tmp_path):
    """Checkpoints from before transformers 5 write rope_theta and rope_scaling."""
    source = random_llama(rope_parameters=LLAMA3 | {"rope_theta": 5e5})
    source.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = rope
    path.write_text(json.dumps(config))
    torch.testing.assert_close(
        logits(load_hf(tmp_path), IDS), theirs(source, IDS), rtol=1e-4, atol=2e-5
    )


def test_a_model_from_scratch_is_a_llama_for_transformers(tmp_path):
    model = new_model(
        ShapeConfig(d_model=32, layers=2, heads=4, kv_heads=2, d_ff=48),
        vocab_size=V,
        document_id=7,
        max_block=16,
        max_positions=64,
        seed=3,
    )
    save_hf(model, tmp_path)
    read = LlamaForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(theirs(read, IDS), logits(model, IDS), rtol=1e-4, atol=1e-5)
    assert (read.config.bos_token_id, read.config.eos_token_id) == (7, 7)
    assert load_hf(tmp_path, max_block=16).config == model.config


def test_new_models_are_a_function_of_the_seed():
    def weights(seed: int) -> dict[str, torch.Tensor]:
        shape = ShapeConfig(d_model=16, layers=1, heads=2, kv_heads=1, d_ff=24)
        model = new_model(
            shape, vocab_size=V, document_id=0, max_block=4, max_positions=32, seed=seed
        )
        return dict(model.state_dict())

    a, b, c = weights(1), weights(1), weights(2)
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(a["embedding.weight"], c["embedding.weight"])
    torch.testing.assert_close(a["mask_embedding"], a["embedding.weight"].mean(0))
    assert not a["length_head.weight"].any()


def test_mask_is_an_input_of_its_own_and_never_an_output(tmp_path):
    random_llama().save_pretrained(tmp_path)
    model = load_hf(tmp_path)
    ids = IDS.clone()
    ids[0, 5] = model.mask_id
    embedded = model.embed(ids)
    torch.testing.assert_close(embedded[0, 5], model.embedding.weight.mean(0))
    rest = ids != model.mask_id
    assert torch.equal(embedded[rest], model.embedding.weight[ids[rest]])
    assert logits(model, ids).shape[-1] == V
    model.embed(ids).sum().backward()
    assert model.mask_embedding.grad is not None
    assert torch.equal(model.mask_embedding.grad, torch.ones(32))


@pytest.mark.parametrize("backend", ["reference", "tiles"])
@pytest.mark.parametrize("again", [False, True])
@pytest.mark.parametrize("granularities", [(), (3,)])
def test_asking_for_some_rows_gives_those_rows_and_their_gradients(again, backend, granularities):
    """Of two batch rows, and of one (which alone does without the other queries); with and without
    activation checkpointing."""
    batch = make_batch([[[3, 4], [5]], [[8, 2]]], 20)
    model = tiny_model(layers=3, qk_norm=True, granularities=granularities)
    ids = torch.from_numpy(batch.token_ids)
    positions, ranges = torch.arange(20).expand_as(ids), clean_ranges(batch)
    told = torch.zeros_like(ids) if granularities else None

    def states(lines: int, rows: torch.Tensor | None) -> torch.Tensor:
        attend = model.attend(ranges[:lines], backend=backend)
        with recomputed(model) if again else contextlib.nullcontext():
            return model.hidden(
                ids[:lines], positions[:lines], attend, rows=rows,
                granularity=None if told is None else told[:lines],
            )  # fmt: skip

    for lines, rows in ((2, [3, 0, 25, 3]), (1, [3, 0, 12, 3])):
        results = []
        for found in (states(lines, None).flatten(0, 1)[rows], states(lines, torch.tensor(rows))):
            model.zero_grad()
            (found * torch.arange(found.numel()).view_as(found).cos()).sum().backward()
            grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
            results.append((found, grads))
        torch.testing.assert_close(results[1][0], results[0][0], rtol=0, atol=1e-12)
        torch.testing.assert_close(results[1][1], results[0][1], rtol=0, atol=1e-11)


def test_rows_that_are_not_asked_for_have_no_queries_in_the_last_layer():
    model, asked = tiny_model(layers=2), []
    ids = torch.arange(10)[None]
    ranges = clean_ranges(make_batch([[[5, 4]]], 10))

    def attend(layer, q, k, v, rows=None):
        asked.append((q.shape[2], k.shape[2]))
        return RangeAttend(ranges, backend="reference")(layer, q, k, v, rows)

    model.hidden(ids, ids, attend, rows=torch.tensor([7, 2]))
    assert asked == [(10, 10), (2, 10)]


def test_norms_and_angles_stay_float32_under_autocast(tmp_path):
    """bfloat16 only in the products: the result is near the float32 one, states are float32."""
    random_llama(tie_word_embeddings=True).save_pretrained(tmp_path)
    model = load_hf(tmp_path)
    ids, positions = IDS, torch.arange(M).expand_as(IDS) + 60
    ranges = torch.zeros(2, M, 4, dtype=torch.int64)
    ranges[..., 1] = torch.arange(M) + 1
    attend = model.attend(ranges, backend="reference")
    with torch.no_grad():
        exact = model.hidden(ids, positions, attend)
        with torch.autocast("cpu", torch.bfloat16):
            low = model.hidden(ids, positions, attend)
    assert low.dtype == torch.float32
    assert 0 < (low - exact).norm() < 6e-2 * exact.norm()
