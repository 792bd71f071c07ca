"""Medians and bootstrap intervals of interleaved measurements."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import numpy as np


class Row(TypedDict):
    """One figure of the benchmark table; low and high bound a 95 % bootstrap interval."""

    figure: str
    value: float
    low: float
    high: float
    unit: str
    detail: str


def ratio_row(
    figure: str, numerator: Sequence[float], denominator: Sequence[float], detail: str
) -> Row:
    """Ratio of medians of two interleaved series; pairs are resampled together."""
    a, b = np.asarray(numerator), np.asarray(denominator)
    assert a.shape == b.shape
    picks = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    ratios = np.median(a[picks], axis=1) / np.median(b[picks], axis=1)
    low, high = np.quantile(ratios, [0.025, 0.975])
    value = float(np.median(a) / np.median(b))
    return Row(
        figure=figure, value=value, low=float(low), high=float(high), unit="ratio", detail=detail
    )
