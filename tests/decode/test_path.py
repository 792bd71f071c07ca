"""The tau-leap sampler against the forward equation of the same model's rates, over all texts.

Test 12 of the proof note (section 8). V vocabulary (document token 0), N longest block.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from abf.base import build
from abf.checked import validate
from abf.decode.config import (
    DecoderConfig,
    FixedExtent,
    LengthHeadExtent,
    PathStrategy,
    SamplerConfig,
)
from abf.decode.request import Prompt, RequestState
from abf.decode.strategy.path import poisson
from abf.decode.trace import TraceWriter, read_trace
from abf.decode.view import Action, BlockView, Tokens
from abf.errors import ConfigError
from abf.model.config import ModelConfig
from abf.model.transformer import EDITS, Transformer
from tests.decode.blocks import Driver, Scripted
from tests.decode.test_abf import MASK, PlainLoop, view
from tests.decode.tiny import edit_model, tiny_engine

LATE, WRONG = 0.3, 0.6


def small_model(V: int, N: int) -> Transformer:
    torch.set_num_threads(1)
    config = ModelConfig(
        vocab_size=V, d_model=16, layers=1, heads=2, kv_heads=1, head_dim=8, d_ff=16,
        max_block=N, max_positions=16, tie_embeddings=False,
    )  # fmt: skip
    model = Transformer(config)
    model.initialise(torch.Generator().manual_seed(1))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(6)
        model.length_head.weight.normal_(0, 0.3, generator=torch.Generator().manual_seed(2))
    model = edit_model(busy=0.15, model=model.eval())
    with torch.no_grad():  # neither every block nor none grows to N, and many tokens are mended
        model.edit_head.bias[:3] = torch.tensor([-1.0, 0.5, 1.5])
    return model


def law(model: Transformer, V: int, N: int, *, end: float = 40.0, steps: int = 1600) -> Any:
    """Probability of every finished text, by RK4 on the forward equation."""
    texts = [s for n in range(N + 1) for s in itertools.product(range(V + 1), repeat=n)]
    number = {s: i for i, s in enumerate(texts)}
    loop = PlainLoop(model, Any, shift=True)  # pyright: ignore[reportArgumentType]
    moves: list[tuple[int, int, str, float, float, float]] = []
    for s in texts:
        probs, raw = loop.read([0], list(s))
        size, until, again = (raw[:, EDITS.index(x)].tolist() for x in EDITS[:3])
        for gap in range(len(s) + 1) if len(s) < N else ():
            to = (*s[:gap], V, *s[gap:])
            moves.append((number[s], number[to], "insert", size[gap], until[gap], 1.0))
        for i, v in itertools.product(range(len(s)), range(V)):
            to, p = (*s[:i], v, *s[i + 1 :]), float(probs[i, v])
            if s[i] == V:
                rate = (1 - WRONG) * p + WRONG / V
                moves.append((number[s], number[to], "fill", 0.0, 0.0, rate))
            elif v != s[i]:
                moves.append((number[s], number[to], "substitute", again[i], 0.0, p))
    source, target, kind, size, until, scale = (
        np.array(column) for column in zip(*moves, strict=True)
    )
    softplus = np.logaddexp(0, size)

    def slope(tau: float, p: np.ndarray) -> np.ndarray:
        u = math.exp(-tau)
        absent, masked = LATE * u, (1 - LATE) * u + LATE * tau * u
        wrong = WRONG / V * ((1 - LATE) * tau + LATE * tau * tau / 2) * u
        clean = 1 - absent - masked - (V - 1) * wrong
        odds = (V - 1) * wrong / clean if tau > 0 else 0.0
        with np.errstate(divide="ignore"):
            back = 1 / (1 + np.exp(-size) / odds) if odds else np.zeros(len(size))
            grow = softplus / (1 + np.exp(tau - until))
        rate = scale * np.select([kind == "insert", kind == "substitute"], [grow, back], 1.0)
        flow = rate * p[source]
        return np.bincount(target, flow, len(p)) - np.bincount(source, flow, len(p))

    p = np.zeros(len(texts))
    with torch.inference_mode():
        ranges = torch.tensor([[[0, 1, 0, 0]]])
        state = model.hidden(
            torch.tensor([[0]]), torch.tensor([[0]]), model.attend(ranges, backend="reference")
        )
        start = model.length_logits(state)[0, 0].double().softmax(-1)
    for n in range(N + 1):
        p[number[(V,) * n]] = float(start[n])
    h = end / steps
    for k in range(steps):
        t = k * h
        a = slope(t, p)
        b = slope(t + h / 2, p + h / 2 * a)
        c = slope(t + h / 2, p + h / 2 * b)
        p = p + h / 6 * (a + 2 * b + 2 * c + slope(t + h, p + h * c))
    assert p.sum() == pytest.approx(1)
    assert sum(q for s, q in zip(texts, p, strict=True) if V in s) < 1e-9
    found: Counter[Any] = Counter()
    for s, q in zip(texts, p, strict=True):
        found[s[: s.index(0) + 1] if 0 in s else s] += float(q)  # pyright: ignore[reportArgumentType]
    return found


def sampled(
    path: Path, model: Transformer, V: int, N: int, count: int, *, steps: int
) -> tuple[Counter[tuple[int, ...]], float]:
    """First blocks of as many requests, () where the block stayed empty; share of forced ones."""
    strategy = PathStrategy(steps=steps, tau_max=9.0, late=LATE, wrong=WRONG)
    engine = tiny_engine(
        model,
        build(strategy, room="abf.decode.strategy"),
        extent=build(LengthHeadExtent(), room="abf.decode.extent"),
        sampler=SamplerConfig(temperature=1.0),
    )
    prompts = [Prompt(i, str(i), np.zeros(0, dtype=np.int64)) for i in range(count)]
    head = {"mask_id": str(V), "document_id": "0", "requests": str(count)}
    with TraceWriter(path, head) as trace:
        samples = engine.run(prompts, new_tokens=N, trace=trace)
    _, table, _ = read_trace(path)
    late = {
        e["request"]
        for e in table.select(["request", "type", "step"]).to_pylist()
        if e["type"] == "INSERT" and e["step"] >= steps
    }
    found = Counter(() if s.request in late else tuple(s.token_ids.tolist()) for s in samples)
    return found, sum(s.forced_blocks for s in samples) / count


def chi_square(found: Counter[Any], wanted: Counter[Any], count: int) -> tuple[float, int]:
    """Statistic and degrees of freedom; rare texts count as one."""
    common = [s for s in wanted if wanted[s] * count >= 8]
    rest = sum(found[s] for s in found if s not in common)
    left = count * (1 - sum(wanted[s] for s in common))
    value = sum((found[s] - count * wanted[s]) ** 2 / (count * wanted[s]) for s in common)
    return value + (rest - left) ** 2 / max(left, 8), len(common)


@pytest.mark.parametrize(("V", "N"), [(2, 3), (3, 2)])
def test_frequencies_are_the_forward_equations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, V: int, N: int
) -> None:
    monkeypatch.setattr(RequestState, "ended", property(lambda self: bool(self.block_length)))
    model, count = small_model(V, N), 700
    wanted = law(model, V, N)
    assert sum(q > 0.02 for q in wanted.values()) >= 4, "a law of one text would prove little"
    found, forced = sampled(tmp_path / "log", model, V, N, count, steps=40)
    value, freedom = chi_square(found, wanted, count)
    # Mean and deviation of chi-square: 4 of them, with room for the grid's own bias.
    assert value < freedom + 4 * math.sqrt(2 * freedom)
    assert forced < wanted[()] + 0.02, "masks at the end of the grid are rare"
    coarse, _ = sampled(tmp_path / "log", model, V, N, count, steps=2)
    assert chi_square(coarse, wanted, count)[0] > 3 * value, "two leaps are another law"


def test_the_grid_is_kept_where_nothing_happens(tmp_path: Path) -> None:
    """No fixed point, no repeated text, no cap on changes ends a block of a timed strategy."""
    driver = Driver(tmp_path / "log")
    seen: list[list[int]] = []

    def decide(view: BlockView) -> Action:
        seen.append(view.ids.tolist())
        if view.step == 0:
            return Action(fill=Tokens(view.uids, np.array([1, 2])), complete=False)
        if view.step < 20 and view.step % 2:
            return Action(substitute=Tokens(view.uids[:1], 3 - view.ids[:1]), complete=False)
        return Action(complete=view.step == 20)

    assert driver.block(Scripted(decide, timed=True), 2) == 21
    assert [ids[0] for ids in seen[1:]] == [1 + (k + 1) // 2 % 2 for k in range(20)]
    sample = driver.state.sample()
    assert sample.edits["SUBSTITUTE"] == 10
    assert (sample.forced_blocks, sample.stalled_blocks, sample.oscillating_blocks) == (0, 0, 0)


def test_gaps_of_a_group_insert_together() -> None:
    """The first gap of a group stands for it, at the sum of its rates; one step, many draws."""
    ids, draws = [MASK, MASK, 7, MASK], 4000
    raw = np.random.default_rng(3).normal(size=(5, len(EDITS)))
    strategy = build(PathStrategy(steps=10, tau_max=5.0), room="abf.decode.strategy")
    found = np.zeros(5)
    for draw in range(draws):
        uniforms = np.full((5, 3), (draw + 0.5) / draws)
        action = strategy.decide(
            view(ids, best=[0.5] * 4, raw=raw, uniforms=uniforms, room=99), None
        )
        for uid, count in zip(action.insert.uids, action.insert.counts, strict=True):
            found[uid - 99] += count / draws
    size, until = (raw[:, EDITS.index(name)] for name in ("insert", "insert_until"))
    # `view` is at step 3 of a grid of halves: from 1.5 to 2.
    rate = 0.5 * np.log1p(np.exp(size)) / (1 + np.exp(1.75 - until))
    wanted = [rate[:3].sum(), 0, 0, rate[3:].sum(), 0]
    assert found == pytest.approx(wanted, abs=2e-3)
    assert min(wanted[0], wanted[3]) > 0.05


def test_masks_ring_and_tokens_are_looked_at_by_their_rates() -> None:
    """One step on evenly spread numbers: the shares of events, and of what a fill brings."""
    wrong, late, leap, draws = 0.6, 0.3, 0.5, 4000
    cfg = PathStrategy(steps=10, tau_max=10 * leap, late=late, wrong=wrong)
    strategy = build(cfg, room="abf.decode.strategy")
    raw = np.zeros((3, len(EDITS)))
    raw[1, EDITS.index("substitute")] = 2.5
    even = (np.arange(draws) + 0.5) / draws
    turned = np.random.default_rng(0).permutation(even)
    fills, looks = [], 0
    for event, choice in zip(even, turned, strict=True):
        uniforms = np.tile([event, choice, 0.0], (3, 1))
        action = strategy.decide(view([MASK, 7], best=[0.5] * 2, raw=raw, uniforms=uniforms), None)
        fills += action.fill.tokens.tolist()
        assert action.fill.uids.tolist() in ([], [100])
        looks += action.substitute.tokens.tolist() == [11]
    assert len(fills) / draws == pytest.approx(1 - math.exp(-leap), abs=1e-3)
    # Slot 0's own token is 10; any token comes in `wrong` of the cases, one in V of them as that.
    kept = sum(token == 10 for token in fills) / len(fills)
    assert kept == pytest.approx(1 - wrong, abs=0.03)
    assert np.mean([t for t in fills if t != 10]) == pytest.approx(MASK / 2, rel=0.05)
    tau, u = 3.5 * leap, math.exp(-3.5 * leap)
    each = wrong / MASK * ((1 - late) * tau + late * tau * tau / 2) * u
    clean = 1 - late * u - ((1 - late) + late * tau) * u - (MASK - 1) * each
    rate = 1 / (1 + math.exp(-2.5) * clean / ((MASK - 1) * each))
    assert 0.2 < rate < 0.95
    assert looks / draws == pytest.approx(1 - math.exp(-rate * leap), abs=1e-3)


def test_poisson_numbers() -> None:
    uniforms = (np.arange(20000) + 0.5) / 20000
    for mean in (0.0, 0.3, 2.5):
        counts = poisson(np.full(20000, mean), uniforms)
        for k in range(6):
            exact = math.exp(-mean) * mean**k / math.factorial(k)
            assert (counts == k).mean() == pytest.approx(exact, abs=1e-4)


HOT = {"temperature": 1.0, "top_p": 1.0}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": {"temperature": 0.7}}, "needs sampler.temperature 1"),
        ({"sampler": {"temperature": 1.0, "top_p": 0.9}}, "top_p=0.9"),
        ({"reopen": -1.0}, "reopen=-1.0 would be another law"),
        (
            {"extent": {"kind": "length_head", "late": 0.15}},
            "extent.late=0.15: strategy `path` starts",
        ),
        ({"extent": {"kind": "length_head", "pick": "mode"}}, "extent.pick=mode would be another"),
        ({"max_steps_per_block": 60}, r"needs steps \+ 2 = 66"),
    ],
)
def test_what_would_be_another_law_is_refused(changes: dict[str, Any], message: str) -> None:
    settings: dict[str, Any] = {
        "strategy": {"kind": "path"}, "extent": {"kind": "length_head"}, "sampler": HOT,
    }  # fmt: skip
    validate(DecoderConfig, settings, "here")
    with pytest.raises(ConfigError, match=message):
        validate(DecoderConfig, settings | changes, "here")


def test_the_extent_may_be_fixed() -> None:
    cfg = DecoderConfig(
        strategy=PathStrategy(),
        extent=FixedExtent(length=4),
        sampler=SamplerConfig(temperature=1.0),
    )
    assert cfg.strategy.needs_edits
    with pytest.raises(ValidationError, match="every other strategy needs one"):
        DecoderConfig(strategy=PathStrategy(), sampler=SamplerConfig(temperature=1.0))
