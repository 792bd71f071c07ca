"""Intervals and p-values of means over seeds and over resampled documents, each on its scale.

A mean is taken on the scale of its metric and transformed back: a rate on the log scale, because
its spread is multiplicative and its interval must stay above 0; a share within [0, 1]. Pure
functions of arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

_Map = Callable[[ArrayLike], NDArray[np.float64]]


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


@dataclass(frozen=True)
class Scale:
    """Where the mean of a metric is taken."""

    to: _Map
    back: _Map
    low: float = -np.inf
    """Lowest possible value, on the transformed scale."""
    high: float = np.inf

    def mean(self, values: ArrayLike, axis: int | None = None) -> NDArray[np.float64]:
        """Mean along an axis; a rate of 0 makes the mean of rates 0."""
        with np.errstate(divide="ignore"):
            return self.back(np.mean(self.to(values), axis=axis))


def _same(values: ArrayLike) -> NDArray[np.float64]:
    return np.asarray(values, dtype=np.float64)


PLAIN = Scale(_same, _same)
SHARE = Scale(_same, _same, 0.0, 1.0)
RATE = Scale(np.log, np.exp)
"""Geometric mean."""
ERROR = Scale(np.square, np.sqrt, 0.0)
"""Root mean square: standard errors pool as variances."""


def seed_interval(
    values: Sequence[float], confidence: float, scale: Scale = PLAIN
) -> Interval | None:
    """Student's t interval of the mean; None for fewer than two values or a rate of 0."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    with np.errstate(divide="ignore", invalid="ignore"):
        here = scale.to(values)
        half = t.ppf((1 + confidence) / 2, len(here) - 1) * here.std(ddof=1) / len(here) ** 0.5
    if not np.isfinite(half):
        return None
    ends = np.clip([here.mean() - half, here.mean() + half], scale.low, scale.high)
    low, high = scale.back(ends)
    return Interval(float(low), float(high))


def percentiles(draws: NDArray[np.float64], confidence: float) -> Interval | None:
    """Middle `confidence` of the draws; None if no draw has a denominator."""
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return None
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def t_test(mean: float, error: float, degrees: int) -> float:
    """Two-sided p of a mean against 0, given its standard error."""
    from scipy.stats import t

    if error == 0:
        return float(mean == 0)
    return float(2 * t.sf(abs(mean) / error, degrees))


def holm(p: Sequence[float]) -> list[float]:
    """p-values adjusted for all of them being looked at, in the order given.

    Holds the chance of one false finding or more at the level they are read at, however the
    comparisons depend on each other. Source: Holm (1979), A simple sequentially rejective multiple
    test procedure, Scand. J. Statist. 6, 65-70.
    """
    order = sorted(range(len(p)), key=lambda at: p[at])
    adjusted, highest = [0.0] * len(p), 0.0
    for rank, at in enumerate(order):
        highest = max(highest, min(1.0, (len(p) - rank) * p[at]))
        adjusted[at] = highest
    return adjusted
