"""Lengths of the blocks that were really trained on (after caps and joins), as counts that add up.

Bins are powers of two: 1, 2, 3-4, 5-8 ... up to the longest block.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray

from abf.data.loader import PackedBatch
from abf.diffusion.layout import block_lengths, block_starts

_PREFIX = "block_length."


def bin_names(longest: int) -> list[str]:
    """Names of the counts for a model with blocks of up to so many tokens."""
    edges = [1 << bit for bit in range((longest - 1).bit_length() + 1)]
    lows = [1, *(edge + 1 for edge in edges)]
    pairs = [(low, min(edge, longest)) for low, edge in zip(lows, edges, strict=False)]
    return [f"{_PREFIX}{low}" if low == high else f"{_PREFIX}{low}_{high}" for low, high in pairs]


def count_lengths(batch: PackedBatch, longest: int) -> NDArray[np.int64]:
    """How many charged blocks of each bin the rows hold."""
    lengths = block_lengths(batch)[block_starts(batch)]
    bins = np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    return np.bincount(bins, minlength=len(bin_names(longest)))


def shares(window: Mapping[str, float]) -> dict[str, float]:
    """Share of blocks in each bin, and their mean length; nothing where none were counted."""
    counts = {name: count for name, count in window.items() if name.startswith(_PREFIX)}
    total = sum(counts.values())
    if not total:
        return {}
    found = {name.replace(".", "_"): count / total for name, count in counts.items()}
    return found | {"block_length_mean": window["tokens"] / total}
