"""Bootstrap over documents, against what is known of simple samples."""

from __future__ import annotations

import numpy as np
import pytest

from abf.eval.intervals import bootstrap_ratio


def test_interval_of_a_mean_is_the_normal_one() -> None:
    values = np.random.default_rng(1).normal(5.0, 2.0, size=400)
    found = bootstrap_ratio(values, np.ones(400), resamples=4000)
    half = 1.96 * values.std() / 400**0.5
    assert found.value == pytest.approx(values.mean())
    assert found.low == pytest.approx(values.mean() - half, abs=0.02)
    assert found.high == pytest.approx(values.mean() + half, abs=0.02)


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Ratio of sums with unequal documents; 200 samples of 60 documents."""
    rng = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        size = rng.integers(1, 50, size=60).astype(float)
        bits = size * (2.0 + rng.normal(0, 0.5, size=60))
        found = bootstrap_ratio(bits, size, resamples=400)
        assert found.low is not None
        assert found.high is not None
        hits += found.low <= 2.0 <= found.high
    assert 180 <= hits <= 199


def test_the_same_parts_give_the_same_interval() -> None:
    parts = np.arange(1.0, 20.0), np.arange(2.0, 21.0)
    assert bootstrap_ratio(*parts) == bootstrap_ratio(*parts)


def test_documents_with_nothing_to_divide_by() -> None:
    found = bootstrap_ratio(np.array([3.0, 1.0, 0.0]), np.array([2.0, 0.0, 0.0]))
    assert found.value == 2.0
    assert found.low is not None
    assert bootstrap_ratio(np.ones(3), np.zeros(3)) == (None, None, None)
    assert bootstrap_ratio(np.array([3.0]), np.array([2.0])) == (1.5, None, None)
