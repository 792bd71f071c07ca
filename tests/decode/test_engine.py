"""The engine against `transformers`, against itself, and against an independent counter."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abf.base import build
from abf.decode.batch import MixedAttend
from abf.decode.config import (
    AbfStrategy,
    ArStrategy,
    DecoderConfig,
    FixedExtent,
    LengthHeadExtent,
    SamplerConfig,
)
from abf.decode.strategy.ar import Ar
from abf.decode.trace import read_trace
from abf.errors import ConfigError
from abf.model.attention import CacheAttend, RangeAttend
from abf.model.cache import KVCache
from abf.model.huggingface import load_hf
from abf.model.store import with_edit_heads
from abf.model.transformer import Transformer
from tests.decode.runs import AR, block_config, run, tokens
from tests.decode.tiny import V, edit_model, tiny_decode, tiny_engine, tiny_model, tiny_prompts

EDITS = DecoderConfig(
    strategy=AbfStrategy(), extent=FixedExtent(length=6), precision="fp32", batch_size=2
)


def test_greedy_ar_is_transformers_generate(tmp_path: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=160,
        initializer_range=0.3,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    theirs: Any = LlamaForCausalLM(config).eval()
    theirs.save_pretrained(tmp_path / "hf")
    ours = load_hf(tmp_path / "hf", document_id=0)
    prompts = tiny_prompts(5)
    found = tokens(run(tmp_path / "log", AR, ours, prompts, new_tokens=32))
    assert len({token for ids in found for token in ids}) > 20, "the text must vary to prove much"
    for prompt, ids in zip(prompts, found, strict=True):
        context = torch.tensor([[0, *prompt.token_ids.tolist()]])
        wanted = theirs.generate(
            context,
            attention_mask=torch.ones_like(context),
            do_sample=False,
            max_new_tokens=32,
            eos_token_id=0,
            pad_token_id=0,
        )
        assert ids == wanted[0, context.shape[1] :].tolist()


def test_ar_costs_one_forward_a_token(model: Transformer, tmp_path: Path) -> None:
    for sample in run(tmp_path / "log", AR, model, tiny_prompts()):
        assert sample.nfe == sample.positions == len(sample.token_ids)


@pytest.mark.parametrize("threshold", [0.0, 0.5, 1.0])
def test_blocks_of_one_with_shift_are_the_ar_model(
    model: Transformer, tmp_path: Path, threshold: float
) -> None:
    cfg = block_config(threshold, extent=FixedExtent(length=1))
    one, ar = (run(tmp_path / "log", c, model, tiny_prompts()) for c in (cfg, AR))
    assert tokens(one) == tokens(ar)
    assert [s.nfe for s in one] == [s.nfe for s in ar]
    assert np.allclose(one[3].log_probs, ar[3].log_probs)


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("batch_size", [1, 2, 4])
def test_text_does_not_depend_on_the_batch(
    model: Transformer, tmp_path: Path, shift: bool, temperature: float, batch_size: int
) -> None:
    prompts = tiny_prompts()
    sampler = SamplerConfig(temperature=temperature, top_p=0.95)
    found = [
        run(
            tmp_path / "log",
            block_config(0.4, extent=LengthHeadExtent(), sampler=sampler, batch_size=size),
            model,
            order,
            shift=shift,
        )
        for size, order in ((len(prompts), prompts), (batch_size, prompts[::-1]))
    ]
    by_request = {sample.request: sample for sample in found[1]}
    for sample in found[0]:
        other = by_request[sample.request]
        assert sample.token_ids.tolist() == other.token_ids.tolist()
        assert (sample.nfe, sample.positions) == (other.nfe, other.positions)
        assert sample.block_length == other.block_length


def test_another_seed_gives_another_sample(model: Transformer, tmp_path: Path) -> None:
    cfg = block_config(0.4, sampler=SamplerConfig(temperature=1.0))
    one, same, other = (
        tokens(run(tmp_path / "log", cfg, model, tiny_prompts(), seed=seed)) for seed in (0, 0, 1)
    )
    assert one == same
    assert one != other


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("ends", [False, True])
def test_block_decoding_equals_a_plain_loop(
    model: Transformer, tmp_path: Path, shift: bool, ends: bool
) -> None:
    """Oracle: one request, no batch, no skipped forward, every slot looked at."""
    if ends:  # every block it was trained on ended with a slot that says so
        model = with_edit_heads(model).eval()
        with torch.no_grad():
            model.end_embedding.normal_(0, 3, generator=torch.Generator().manual_seed(0))
    prompt, cfg = tiny_prompts()[4], block_config(0.3)
    (sample,) = run(tmp_path / "log", cfg, model, [prompt], shift=shift)
    context = [0, *prompt.token_ids.tolist()]
    found: list[int] = []
    with torch.inference_mode():
        while len(found) < 30 and 0 not in found:
            known = context + found
            n = min(6, 30 - len(found))
            block = [V] * n
            before = _states(model, known, [], causal=True)[-1:]
            while V in block[: block.index(0) if 0 in block else n]:
                end = [model.end_id] * ends
                own = _states(model, known, block + end, causal=False)[None, :n]
                states = torch.cat((before[None], own[:, :-1]), 1) if shift else own
                probs = model.logits(states)[0].softmax(-1)
                best = probs.max(-1)
                open_ = [j for j in range(block.index(0) if 0 in block else n) if block[j] == V]
                sure = [j for j in open_ if best.values[j] >= 0.3]
                for j in sure or [max(open_, key=lambda j: float(best.values[j]))]:
                    block[j] = int(best.indices[j])
            found += block[: block.index(0) + 1] if 0 in block else block
    assert sample.token_ids.tolist() == found


def _states(
    model: Transformer, known: list[int], block: list[int], *, causal: bool
) -> torch.Tensor:
    """States of the block's rows, or of the text's if there is none; one pass over everything."""
    ids = torch.tensor([known + block])
    row = torch.arange(len(known) + len(block))
    end = torch.where(row < len(known), row + 1, len(row))
    ranges = torch.stack([torch.zeros_like(row), end, row * 0, row * 0], -1)[None]
    states = model.hidden(ids, row[None], RangeAttend(ranges, backend="reference"))[0]
    return states if causal else states[len(known) :]


def test_forward_passes_are_counted_right(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[list[int]] = []
    real = Transformer.hidden

    def counting(self: Transformer, ids: Any, positions: Any, attend: Any, **more: Any) -> Any:
        if isinstance(attend, MixedAttend):  # the prefill, which is not counted, is causal for all
            passes.append(attend.query_lengths.tolist())
        return real(self, ids, positions, attend, **more)

    monkeypatch.setattr(Transformer, "hidden", counting)
    cfg = block_config(0.4, extent=LengthHeadExtent(), batch_size=4)
    samples = run(tmp_path / "log", cfg, model, tiny_prompts(4))
    assert sum(s.nfe for s in samples) == sum(len(rows) for rows in passes)
    assert sum(s.positions for s in samples) == sum(sum(rows) for rows in passes)
    assert min(min(rows) for rows in passes) > 0, "nobody sits in a pass without rows"
    for prompt in tiny_prompts(4):
        passes.clear()
        (sample,) = run(tmp_path / "log", cfg, model, [prompt])
        assert sample.nfe == len(passes)
        assert sample.positions == sum(rows[0] for rows in passes)


def test_threshold_zero_takes_one_step_a_block(model: Transformer, tmp_path: Path) -> None:
    for sample in run(tmp_path / "log", block_config(0.0), model, tiny_prompts()):
        assert sample.nfe == 2 * len(sample.block_length)


def test_threshold_one_commits_one_token_a_step(tmp_path: Path) -> None:
    unsure = tiny_model(scale=4.0)  # never sure to the last bit
    samples = run(tmp_path / "log", block_config(1.0), unsure, tiny_prompts())
    _, events, _ = read_trace(tmp_path / "log")
    steps = Counter(
        (e["request"], e["block"], e["step"]) for e in events.to_pylist() if e["type"] == "FILL"
    )
    assert set(steps.values()) == {1}
    assert sum(len(s.token_ids) + s.dropped for s in samples) >= len(steps)


def test_audit_is_the_ar_log_probability(model: Transformer, tmp_path: Path) -> None:
    """KV pass and AR model agree: one uncached causal pass over the finished text."""
    samples = run(tmp_path / "log", block_config(0.3), model, tiny_prompts())
    _, events, _ = read_trace(tmp_path / "log")
    logged = [e for e in events.to_pylist() if e["type"] == "KV_WRITE"]
    for sample, prompt in zip(samples, tiny_prompts(), strict=True):
        text = [0, *prompt.token_ids.tolist(), *sample.token_ids.tolist()]
        with torch.inference_mode():
            log_probs = model.logits(_states(model, text, [], causal=True)).log_softmax(-1)
        first = 1 + len(prompt.token_ids)
        wanted = [float(log_probs[p - 1, text[p]]) for p in range(first, len(text))]
        assert np.allclose(sample.log_probs, wanted, atol=1e-4)
        probs = [e["prob"] for e in logged if e["request"] == sample.request]
        assert np.allclose(probs, np.exp(wanted), atol=1e-4)


def test_last_block_is_cut_to_the_budget(model: Transformer, tmp_path: Path) -> None:
    for sample in run(tmp_path / "log", block_config(0.5), model, tiny_prompts(), new_tokens=16):
        assert sum(sample.block_length) == len(sample.token_ids) <= 16
        if not sample.finished:
            assert sample.block_length == [6, 6, 4]


def test_length_head_decides_the_extent(model: Transformer, tmp_path: Path) -> None:
    cfg = block_config(0.5, extent=LengthHeadExtent(pick="mode"))
    samples = run(tmp_path / "log", cfg, model, tiny_prompts())
    for sample, prompt in zip(samples, tiny_prompts(), strict=True):
        text = [0, *prompt.token_ids.tolist(), *sample.token_ids.tolist()]
        with torch.inference_mode():
            states = _states(model, text, [], causal=True)
            wanted = model.length_logits(states)[:, 1:].argmax(-1) + 1
        place, left = len(prompt.token_ids), 30
        for length in sample.block_length[: -1 if sample.finished else None]:
            assert length == min(int(wanted[place]), left)
            place, left = place + length, left - length


def test_block_causal_commit_sees_the_whole_block(model: Transformer) -> None:
    """Keys written by a block-causal model's closing pass differ from the causal ones."""
    found = []
    for causal in (True, False):
        cache = KVCache(model.config, 1)
        lengths = torch.tensor([3])
        attend = MixedAttend(
            cache, query_lengths=lengths, causal=torch.tensor([causal]), backend="reference"
        )
        own = "causal" if causal else "block"
        plain = CacheAttend(cache, query_lengths=lengths, own=own, backend="reference")
        assert attend.seen(3).tolist() == plain.seen(3).tolist()
        with torch.inference_mode():
            found.append(model.hidden(torch.tensor([[5, 6, 7]]), torch.arange(3)[None], attend))
    assert not torch.allclose(found[0][0, 0], found[1][0, 0])


def test_block_causal_decode_has_no_ar_audit(model: Transformer, tmp_path: Path) -> None:
    cfg = block_config(0.3)
    samples = run(tmp_path / "log", cfg, model, tiny_prompts(), clean_stream="block_causal")
    assert all(np.isnan(sample.log_probs).all() for sample in samples)


def test_an_ar_view_that_sees_ahead_is_refused(model: Transformer, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"strategy 'ar' .*'block_causal'.*another strategy"):
        run(tmp_path / "log", AR, model, tiny_prompts(), clean_stream="block_causal")


def test_bf16_decodes(model: Transformer, tmp_path: Path) -> None:
    samples = run(tmp_path / "log", block_config(0.3, precision="bf16"), model, tiny_prompts(2))
    assert all(len(sample.token_ids) for sample in samples)


@pytest.mark.parametrize("positions", ["rotary", "learned"])
def test_a_text_longer_than_the_positions_is_refused_before_any_is_decoded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, positions: str
) -> None:
    """Text-5 has 15 tokens: with 145 more and the document token it is one too long. It is in the
    last of three batches; nothing is forwarded for the others."""
    model = edit_model(model=tiny_model(positions=positions))
    prompts = tiny_prompts()
    monkeypatch.setattr(model, "hidden", lambda *args, **kwargs: pytest.fail("a forward pass"))
    said = rf"text-5.*15 prompt tokens \+ 145 new.* = 161.*160 positions \({positions}\): lower new"
    for cfg in (AR, block_config(0.5, batch_size=2), EDITS):
        with pytest.raises(ConfigError, match=said):
            run(tmp_path / "log", cfg, model, prompts, new_tokens=145)
    monkeypatch.undo()
    for cfg in (AR, EDITS):  # up to the last position; the end of the last block lies behind it
        for sample in run(tmp_path / "log", cfg, model, prompts[4:], new_tokens=144):
            assert sample.finished or len(sample.token_ids) == 144


def test_unresolved_precision_is_refused(model: Transformer, tmp_path: Path) -> None:
    cfg = DecoderConfig(strategy=ArStrategy())
    with pytest.raises(ConfigError, match="precision='auto' was not resolved"):
        run(tmp_path / "log", cfg, model, tiny_prompts())


def test_ar_ignores_the_read_out_of_the_block_model(model: Transformer, tmp_path: Path) -> None:
    with_shift, without = (
        tokens(run(tmp_path / "log", AR, model, tiny_prompts(), shift=shift))
        for shift in (True, False)
    )
    assert with_shift == without
    engine = tiny_engine(model, Ar(), extent=build(FixedExtent(length=1), room="abf.decode.extent"))
    assert tokens(tiny_decode(tmp_path / "log", engine, tiny_prompts())) == with_shift
