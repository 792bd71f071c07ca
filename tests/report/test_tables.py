"""Estimates and differences against plain computations, closed forms and enumeration."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from abf.report.metrics import NOISE
from abf.report.tables import (
    CellScores,
    Key,
    admit,
    differences,
    estimates,
    resampled_ratios,
)

KEY = Key("likelihood", 1, "", "ar_bits_per_byte")
DOCUMENTS = 60
LEVELS = {"a": 2.0, "b": 2.2, "c": 2.5}


def cell(arm: str, seed: int, parts: np.ndarray | None, value: float | None, note: str = "") -> Any:
    """One metric of one cell; parts is [documents, 2]."""
    score = {
        "task": KEY.task,
        "task_version": KEY.task_version,
        "decoder": KEY.decoder,
        "metric": KEY.metric,
        "unit": "bits/byte",
        "value": value,
        "note": note,
    }
    documents = [
        {
            "task": KEY.task,
            "decoder": KEY.decoder,
            "metric": KEY.metric,
            "document": f"doc{i}",
            "numerator": float(numerator),
            "denominator": float(denominator),
        }
        for i, (numerator, denominator) in enumerate([] if parts is None else parts)
    ]
    return CellScores(arm, seed, [score], documents)


def drawn(seed: int, level: float) -> np.ndarray:
    """[documents, 2] numerators and denominators; the denominators are those of every cell."""
    sizes = np.random.default_rng(5).integers(50, 500, DOCUMENTS)
    bits = sizes * (level + np.random.default_rng(seed).normal(0, 0.3, DOCUMENTS))
    return np.stack([bits, sizes], axis=1)


def cells(arms: dict[str, float], seeds: int = 3) -> list[CellScores]:
    found = []
    for arm, level in arms.items():
        for seed in range(seeds):
            parts = drawn(100 * len(arm) + seed, level)
            found.append(cell(arm, seed, parts, parts[:, 0].sum() / parts[:, 1].sum()))
    return found


def test_mean_and_interval_over_seeds():
    members = cells({"fixed": 2.0})
    (estimate,) = estimates(members, confidence=0.9, resamples=100).values()
    values = [member.scores[0]["value"] for member in members]
    assert estimate.mean == pytest.approx(np.mean(values))
    half = 2.919986 * np.std(values, ddof=1) / math.sqrt(3)  # tabulated t, 2 degrees of freedom
    expected = (np.mean(values) - half, np.mean(values) + half)
    assert estimate.over_seeds == pytest.approx(expected, rel=1e-6)
    assert estimate.values == dict(enumerate(values))


def test_interval_over_documents_agrees_with_a_plain_bootstrap():
    members = cells({"fixed": 2.0})
    (estimate,) = estimates(members, confidence=0.95, resamples=4000).values()
    parts = np.array([drawn(500 + seed, 2.0) for seed in range(3)])
    rng = np.random.default_rng(77)
    draws = []
    for _ in range(4000):
        chosen = parts[:, rng.integers(DOCUMENTS, size=DOCUMENTS)]
        draws.append((chosen[..., 0].sum(1) / chosen[..., 1].sum(1)).mean())
    expected = np.quantile(draws, [0.025, 0.975])
    width = expected[1] - expected[0]
    assert estimate.over_documents == pytest.approx(expected, abs=0.1 * width)
    assert estimate.documents == DOCUMENTS


def test_documents_that_are_alike_leave_no_interval_width():
    sizes = np.arange(1, 11)
    parts = np.stack([2.0 * sizes, sizes], axis=1)
    (estimate,) = estimates([cell("a", 0, parts, 2.0)], confidence=0.9, resamples=50).values()
    assert estimate.over_documents == pytest.approx((2.0, 2.0))
    assert estimate.over_seeds is None


def test_paired_difference_drops_what_arms_share():
    parts = drawn(1, 2.0)
    shifted = parts + np.stack([0.25 * parts[:, 1], 0 * parts[:, 1]], axis=1)
    members = [
        cell("a", 0, parts, 2.0),
        cell("a", 1, parts, 2.1),
        cell("b", 0, shifted, 2.25),
        cell("b", 1, shifted, 2.35),
        cell("b", 2, shifted, 9.0),
    ]
    (gap,) = differences(members, [KEY], confidence=0.95, resamples=200)
    assert (gap.arm, gap.baseline, gap.seeds) == ("b", "a", 2)
    assert gap.mean == pytest.approx(0.25)
    assert gap.over_seeds == pytest.approx((0.25, 0.25))
    assert gap.over_documents == pytest.approx((0.25, 0.25))
    assert gap.p == gap.p_adjusted == pytest.approx(0)
    assert gap.separated(0.95)


def test_difference_needs_both_intervals_to_be_separated():
    parts = drawn(1, 2.0)
    members = [cell("a", 0, parts, 2.0), cell("b", 0, np.add(parts, [60, 0]), 2.3)]
    (gap,) = differences(members, [KEY], confidence=0.95, resamples=100)
    assert gap.over_seeds is None
    assert gap.over_documents is not None
    assert gap.p is None
    assert not gap.separated(0.95)


def test_p_over_documents_agrees_with_all_resamples():
    parts = np.array([[9.0, 4.0], [14.0, 6.0], [8.0, 5.0], [21.0, 8.0]])
    more = parts + np.array([[3.0, 0.0], [-1.0, 0.0], [2.0, 0.0], [1.0, 0.0]])
    members = [cell("a", 0, parts, 2.0), cell("a", 1, parts, 3.0)]
    members += [cell("b", 0, more, 2.25), cell("b", 1, more, 3.25)]  # p over seeds is 0
    (gap,) = differences(members, [KEY], confidence=0.95, resamples=40_000)
    chosen = np.array(list(itertools.product(range(4), repeat=4)))
    gaps = (more - parts)[chosen, 0].sum(axis=1) / parts[chosen, 1].sum(axis=1)
    t = 0.25 / gaps.std()
    below = 0.5 + (t / math.sqrt(3) / (1 + t * t / 3) + math.atan(t / math.sqrt(3))) / math.pi
    assert gap.p == pytest.approx(2 * (1 - below), rel=0.03)


def test_p_is_the_larger_one_and_is_corrected_for_every_comparison():
    sizes = np.arange(1.0, DOCUMENTS + 1)
    parts = {arm: np.stack([level * sizes, sizes], axis=1) for arm, level in LEVELS.items()}
    noise = {"a": [0, 0, 0], "b": [0.01, 0.0, -0.01], "c": [0.15, 0.0, -0.15]}
    members = [
        cell(arm, seed, parts[arm], LEVELS[arm] + noise[arm][seed])
        for arm in LEVELS
        for seed in range(3)
    ]
    gaps = differences(members, [KEY], confidence=0.95, resamples=200)
    expected = []
    for gap in gaps:
        spread = [x - y for x, y in zip(noise[gap.arm], noise[gap.baseline], strict=True)]
        t = abs(gap.mean) / (np.std(spread, ddof=1) / math.sqrt(3))
        expected.append(1 - t / math.sqrt(t * t + 2))  # two-sided, 2 degrees of freedom
    assert [gap.p for gap in gaps] == pytest.approx(expected)
    low, middle, high = sorted(expected)
    adjusted = {low: 3 * low, middle: max(2 * middle, 3 * low), high: max(high, 2 * middle)}
    assert [gap.p_adjusted for gap in gaps] == pytest.approx(
        [min(1, adjusted[p]) for p in expected]
    )
    assert [(gap.arm, gap.separated(0.95)) for gap in gaps] == [
        ("b", True),
        ("c", False),
        ("c", False),
    ]
    # Alone, the same difference would have been said to be there.
    assert gaps[1].p is not None
    assert gaps[1].p < 0.05 < (gaps[1].p_adjusted or 0)


def test_a_rate_is_averaged_on_its_own_scale():
    key = {"metric": "tokens_per_second", "unit": "tokens/s", "decoder": "ar"}
    members = []
    for seed, speed in enumerate((100.0, 400.0)):
        parts = np.stack([speed * np.ones(5), np.ones(5)], axis=1)
        made = cell("a", seed, parts, speed)
        rows = [{**row, **key} for row in made.scores]
        members.append(CellScores("a", seed, rows, [{**row, **key} for row in made.documents]))
    (estimate,) = estimates(members, confidence=0.95, resamples=50).values()
    assert estimate.mean == pytest.approx(200)
    assert estimate.over_documents == pytest.approx((200, 200))
    assert estimate.over_seeds is not None
    assert estimate.over_seeds.low > 0


def test_documents_missing_in_one_member_are_left_out_of_all():
    one = {"x": (1.0, 1.0), "y": (2.0, 1.0), "z": (3.0, 1.0)}
    two = {"y": (4.0, 2.0), "z": (6.0, 2.0)}
    found = resampled_ratios([one, two], 50)
    assert found is not None
    assert found.documents == 2
    assert np.allclose(found.draws[:, 0], found.draws[:, 1])
    assert resampled_ratios([one, {"x": (1.0, 1.0)}], 50) is None
    assert resampled_ratios([], 50) is None


def test_what_was_not_measured_stays_so():
    members = [cell("a", seed, None, None, "no meter") for seed in range(3)]
    (estimate,) = estimates(members, confidence=0.9, resamples=50).values()
    assert estimate.mean is None
    assert estimate.notes == ("no meter",)
    entered, left_out = admit({("a", KEY): estimate}, lambda arm: True)
    assert list(entered) == [("a", KEY)]
    assert not left_out


def test_what_may_not_enter_is_named_with_its_reason():
    bare = estimates([cell("a", 0, None, 2.0)], confidence=0.9, resamples=50)
    _, ((_, reason),) = admit(bare, lambda arm: True)
    assert "no interval" in reason
    error = bare[("a", KEY)]
    error = replace(error, key=KEY._replace(metric=NOISE))
    assert admit({("a", error.key): error}, lambda arm: True)[0]  # an error needs none of its own
    full = estimates(cells({"a": 2.0}), confidence=0.9, resamples=50)
    entered, ((_, reason),) = admit(full, lambda arm: False)
    assert not entered
    assert "no cost on record" in reason
