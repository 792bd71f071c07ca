"""The threshold rule and the extents on hand-made numbers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abf.base import build
from abf.decode.config import FixedExtent, LengthHeadExtent, ThresholdStrategy
from abf.decode.extent.length_head import finished
from abf.decode.view import BlockView, ExtentView


def view(confidence: list[float | None]) -> BlockView:
    """A block with these confidences; None is a committed slot. uids are 100, 101 ..."""
    n = len(confidence)
    values = np.array([np.nan if c is None else c for c in confidence], dtype=np.float32)
    is_mask = ~np.isnan(values)
    return BlockView(
        request=0,
        block=0,
        step=0,
        steps_left=9,
        tokens_left=50,
        mask_id=999,
        document_id=0,
        forbidden=np.zeros(0, int),
        uids=100 + np.arange(n),
        ids=np.where(is_mask, 999, 7),
        is_mask=is_mask,
        token=np.where(is_mask, 10 + np.arange(n), -1),
        confidence=values,
        entropy=values,
        margin=values,
        top_ids=np.full((n, 4), -1),
        top_probs=np.full((n, 4), np.nan),
        commit_step=np.where(is_mask, -1, 0),
        commit_confidence=np.where(is_mask, np.nan, 1.0),
    )


def committed(
    threshold: float, confidence: list[float | None], window: int | None = None
) -> dict[int, int]:
    cfg = ThresholdStrategy(threshold=threshold, window=window)
    strategy = build(cfg, room="abf.decode.strategy")
    action = strategy.decide(view(confidence), None)
    assert action.bars["FILL"] == threshold
    return dict(zip(action.commit.uids.tolist(), action.commit.tokens.tolist(), strict=True))


@pytest.mark.parametrize(
    ("threshold", "confidence", "slots"),
    [
        (0.9, [0.95, 0.2, 0.91, 0.89], [0, 2]),
        (0.5, [0.5, 0.499], [0]),
        (0.9, [0.3, 0.6, 0.6], [1]),
        (0.9, [None, 0.1, 0.95, None], [2]),
        (0.9, [None, 0.1, 0.2, None], [2]),
        (0.0, [0.0, 0.4, None], [0, 1]),
        (1.0, [0.999, 1.0, 1.0], [1, 2]),
        (1.0, [0.0, 0.0], [0]),
    ],
)
def test_threshold_rule(threshold: float, confidence: list[float | None], slots: list[int]) -> None:
    assert committed(threshold, confidence) == {100 + j: 10 + j for j in slots}


@given(
    threshold=st.floats(0, 1, width=32),
    confidence=st.lists(st.one_of(st.none(), st.floats(0, 1, width=32)), min_size=1, max_size=20),
    window=st.none() | st.integers(1, 5),
)
def test_threshold_rule_against_its_words(
    threshold: float, confidence: list[float | None], window: int | None
) -> None:
    if all(c is None for c in confidence):
        return
    found = {uid - 100 for uid in committed(threshold, confidence, window)}
    masks = dict([(j, c) for j, c in enumerate(confidence) if c is not None][:window])
    passing = {j for j, c in masks.items() if c >= threshold}
    if passing:
        assert found == passing
    else:
        assert found == {min(j for j, c in masks.items() if c == max(masks.values()))}


def extent_view(probs: Any, uniform: float) -> ExtentView:
    return ExtentView(
        request=0, block=0, tokens_left=9, length_probs=np.array(probs), uniform=uniform
    )


def test_length_head_inverts_the_distribution() -> None:
    policy = build(LengthHeadExtent(), room="abf.decode.extent")
    probs = [0.0, 0.25, 0.5, 0.0, 0.25, 0.0]
    uniforms = (np.arange(400) + 0.5) / 400
    lengths = [policy.next_extent(extent_view(probs, u)).length for u in uniforms]
    assert np.bincount(lengths, minlength=7).tolist() == [0, 0, 100, 200, 0, 100, 0]
    assert policy.next_extent(extent_view([1.0, 0.0], 0.0)).length == 1
    assert policy.next_extent(extent_view([0.1] * 9, 1 - 1e-16)).length == 9


def start_of(law: dict[int, float], late: float, *, most: int, least: int = 1) -> list[float]:
    """Law of the masks at the start of a path, from its definition: a token is one or is late."""
    probs = [0.0] * (most + 1)
    for length, weight in law.items():
        for masks in range(length + 1):
            ways = math.comb(length, masks)
            probs[masks] += weight * ways * (1 - late) ** masks * late ** (length - masks)
    kept = probs[least:]
    return [p / sum(kept) for p in kept]


@pytest.mark.parametrize("least", [0, 1])
@pytest.mark.parametrize("law", [{7: 1.0}, {1: 1.0}, {3: 0.3, 9: 0.7}, {2: 0.4, 6: 0.4, 12: 0.2}])
def test_late_tokens_are_opened_too(law: dict[int, float], least: int) -> None:
    probs = np.array(start_of(law, 0.15, most=12, least=least))
    found = finished(probs, least=least, late=0.15)
    assert found.sum() == pytest.approx(1)
    nearby = {n: found[max(0, n - 1 - least) : n + 2 - least].sum() for n in law}
    assert nearby == pytest.approx(law, abs=0.03)
    mode = build(LengthHeadExtent(pick="mode", late=0.15), room="abf.decode.extent")
    view = dataclasses.replace(extent_view(probs, 0.5), least=least)
    assert mode.next_extent(view).length in {n for n in law if law[n] == max(law.values())}


def test_short_blocks_are_opened_as_often_as_they_come() -> None:
    """A block of one token starts without a mask 15 times in 100, and a start of none is not among
    the `least` that are asked for: one token is commoner than one mask says."""
    law = {1: 0.5, 8: 0.5}
    found = finished(np.array(start_of(law, 0.15, most=12)), least=1, late=0.15)
    assert found[0] == pytest.approx(0.5, abs=0.01)


def test_length_head_mode_and_fixed() -> None:
    mode = build(LengthHeadExtent(pick="mode"), room="abf.decode.extent")
    assert mode.next_extent(extent_view([0.2, 0.5, 0.3], 0.99)).length == 2
    fixed = build(FixedExtent(length=7), room="abf.decode.extent")
    assert not fixed.needs_lengths
    assert fixed.next_extent(extent_view([1.0], 0.5)).length == 7
