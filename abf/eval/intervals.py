"""Intervals of a ratio of sums, over documents drawn with replacement.

The generator is seeded by a constant, so the same scores give the same interval everywhere.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

RESAMPLES = 2000
CONFIDENCE = 0.95
_CHUNK = 1 << 22
"""Draws held at once."""


class Interval(NamedTuple):
    """A figure with its lower and upper end; None where it cannot be told."""

    value: float | None
    low: float | None
    high: float | None


def bootstrap_ratio(
    numerator: NDArray[np.float64],
    denominator: NDArray[np.float64],
    *,
    resamples: int = RESAMPLES,
    confidence: float = CONFIDENCE,
) -> Interval:
    """sum(numerator) / sum(denominator) with its percentile interval over documents.

    Args:
        numerator, denominator: [documents]; documents are resampled whole, so that long ones keep
            their weight and what is correlated inside a document stays together.

    Returns:
        No value when the denominators sum to 0; no interval for fewer than two documents.
    """
    total = float(denominator.sum())
    if not total:
        return Interval(None, None, None)
    value, n = float(numerator.sum()) / total, len(numerator)
    if n < 2:
        return Interval(value, None, None)
    rng = np.random.default_rng(0)
    draws = np.empty(resamples)
    step = max(1, _CHUNK // n)
    for start in range(0, resamples, step):
        chosen = rng.integers(n, size=(min(step, resamples - start), n))
        below = denominator[chosen].sum(axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            draws[start : start + len(chosen)] = numerator[chosen].sum(axis=1) / below
    # A draw of documents that all have nothing to divide by is no figure.
    draws = draws[np.isfinite(draws)]
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(value, float(low), float(high))
