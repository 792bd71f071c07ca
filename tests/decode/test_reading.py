"""Reading a few numbers a row against reading all logits: the same texts, the same log."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from abf_kernels.masked_loss.api import Backend

from abf.base import ConfigModel, build
from abf.decode import engine as engine_room
from abf.decode.config import (
    AbfStrategy,
    ArStrategy,
    EarlierExtent,
    FixedExtent,
    LengthHeadExtent,
    PathStrategy,
    SamplerConfig,
    ThresholdStrategy,
)
from abf.decode.reading import Likeliest, Logits, at, head_of, joined
from abf.decode.request import Sample
from abf.decode.trace import read_trace
from abf.model.transformer import Transformer
from tests.decode.tiny import V, tiny_decode, tiny_engine, tiny_prompts

CASES: dict[str, tuple[ConfigModel, ConfigModel, dict[str, Any]]] = {
    "ar": (ArStrategy(), FixedExtent(length=1), {}),
    "threshold": (ThresholdStrategy(), LengthHeadExtent(), {}),
    "own rows": (ThresholdStrategy(threshold=0.5), FixedExtent(length=6), {"shift": False}),
    "whole blocks": (ThresholdStrategy(), FixedExtent(length=6), {"clean_stream": "block_causal"}),
    "abf": (AbfStrategy(substitute=0.1, lock_after=2), LengthHeadExtent(), {}),
    "reopened": (AbfStrategy(operations=("fill",)), FixedExtent(length=6), {"reopen": -2.0}),
    "earlier": (AbfStrategy(substitute=0.1), EarlierExtent(back=1), {}),
    "path": (PathStrategy(steps=8), LengthHeadExtent(), {}),
}


def decoded(
    path: Path, case: str, model: Transformer, editor: Transformer
) -> tuple[list[Sample], list[dict[str, Any]]]:
    strategy, extent, changes = CASES[case]
    built = build(strategy, room="abf.decode.strategy")
    opened = build(extent, room="abf.decode.extent")
    engine = tiny_engine(editor if built.needs_edits else model, built, extent=opened, **changes)
    samples = tiny_decode(path, engine, tiny_prompts()[opened.back :])
    return samples, read_trace(path)[1].to_pylist()


@pytest.mark.parametrize("case", CASES)
def test_texts_and_logs_are_those_of_all_logits(
    case: str,
    model: Transformer,
    editor: Transformer,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    samples, log = decoded(tmp_path / "few", case, model, editor)
    made = []

    def all_logits(model: Transformer, sampler: SamplerConfig, forbidden: Any, **_: Any) -> Logits:
        made.append(Logits(model, sampler, forbidden))
        return made[-1]

    monkeypatch.setattr(engine_room, "head_of", all_logits)
    wanted, their_log = decoded(tmp_path / "all", case, model, editor)
    assert made, "the engine asks for its head"
    for one, other in zip(samples, wanted, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert (one.nfe, one.positions) == (other.nfe, other.positions)
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-5)
    assert len(log) == len(their_log) > 100
    for one, other in zip(log, their_log, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"wall_s", "state_hash"}:  # hashes are of every bit
            same(one[name], other[name])


def same(one: Any, other: Any) -> None:
    """Equal, numbers but for rounding."""
    if isinstance(one, float | list) and one != other:
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5)
    else:
        assert one == other


@pytest.mark.parametrize(
    ("temperature", "forbidden", "kind"),
    [(0.0, (), Likeliest), (0.0, (3,), Logits), (1.0, (), Logits)],
)
def test_logits_are_read_where_a_draw_or_a_forbidden_token_needs_them(
    temperature: float, forbidden: tuple[int, ...], kind: type, model: Transformer
) -> None:
    sampler = SamplerConfig(temperature=temperature)
    assert type(head_of(model, sampler, forbidden, backend="tiles")) is kind


@pytest.mark.parametrize("backend", ["tiles", "reference"])
def test_what_is_said_of_a_row(backend: Backend, model: Transformer) -> None:
    generator = torch.Generator().manual_seed(1)
    states = torch.randn(V, model.config.d_model, generator=generator)
    with torch.inference_mode():
        head = head_of(model, SamplerConfig(), (), backend=backend)
        said = joined(head.read(states[:9]), head.read(states[9:]))
        found = head.propose(said, None)
        tokens = torch.arange(V)
        nats = head.log_probs(said, tokens)
        turned = head.log_probs(at(said, tokens.flip(0)), tokens)
    wanted = (states.double() @ model.head_weight.detach().double().T).log_softmax(-1)
    torch.testing.assert_close(nats.double(), wanted.diagonal(), rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(turned.double(), wanted.flip(0).diagonal(), rtol=1e-5, atol=1e-4)
    probs, ids = wanted.exp().topk(4)
    assert found.token.tolist() == ids[:, 0].tolist()
    assert (found.top_ids == ids.numpy()).mean() > 0.99  # equals may come in any order
    np.testing.assert_allclose(found.top_probs, probs, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(found.confidence, probs[:, 0], rtol=1e-4)
    entropy = -(wanted.exp() * wanted).sum(-1)
    np.testing.assert_allclose(found.entropy, entropy, rtol=1e-4, atol=1e-5)


def test_a_sure_token_has_no_log_probability_above_0(model: Transformer) -> None:
    states = 40 * torch.randn(64, model.config.d_model, generator=torch.Generator().manual_seed(2))
    with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
        head = head_of(model, SamplerConfig(), (), backend="tiles")
        said = head.read(states.bfloat16())
        nats = head.log_probs(said, said[2][:, 0])
    assert (nats <= 0).all()
    assert (nats == 0).any(), "some are certain, where the error of bfloat16 would show"
