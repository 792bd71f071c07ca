"""What a draft needs to become the finished block: a cheapest alignment, ties broken one way.

A slot that holds its column's token costs nothing, a MASK that stands for a column one, everything
else (another token, a slot without a column, a column without a slot) eight: a token is replaced
rather than deleted and inserted, and a MASK is spent rather than a right token. Among equally cheap
alignments the one is taken that, read from the end, pairs before it deletes and deletes before it
inserts.

Letters: K blocks, n columns (finished tokens) and m slots (of the draft) of the longest.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_FILL, _EDIT = 1, 8


@dataclass(frozen=True)
class Labels:
    """Slots against columns."""

    column: NDArray[np.int64]
    """[K, m] column each slot stands for; -1: none, it is to be deleted (or does not exist)."""
    missing: NDArray[np.int64]
    """[K, m+1] columns to be inserted in each gap; gap i lies before slot i."""


def align(
    clean: NDArray[np.int64],
    columns: NDArray[np.int64],
    text: NDArray[np.int64],
    slots: NDArray[np.int64],
    *,
    mask_id: int,
) -> Labels:
    """Align drafts with finished blocks.

    Args:
        clean: [K, n] finished tokens.
        columns: [K] how many of them.
        text: [K, m] tokens and MASKs.
        slots: [K] how many of them.
        mask_id: id of MASK.
    """
    (K, n), m = clean.shape, text.shape[1]
    pair = np.where(text[:, :, None] == clean[:, None, :], 0, _EDIT)
    pair[text == mask_id] = _FILL
    steps = _EDIT * np.arange(n + 1)
    cost = np.empty((m + 1, K, n + 1), dtype=np.int64)  # of the first i slots and j columns
    cost[0] = steps
    for i in range(m):
        best = cost[i] + _EDIT
        best[:, 1:] = np.minimum(best[:, 1:], cost[i][:, :-1] + pair[:, i])
        cost[i + 1] = np.minimum.accumulate(best - steps, axis=1) + steps

    column = np.full((K, m), -1, dtype=np.int64)
    missing = np.zeros((K, m + 1), dtype=np.int64)
    i, j, block = slots.copy(), columns.copy(), np.arange(K)
    while (going := (i > 0) | (j > 0)).any():
        here = cost[i, block, j]
        before, left = np.maximum(i - 1, 0), np.maximum(j - 1, 0)
        both = (i > 0) & (j > 0)
        paired = both & (here == cost[before, block, left] + pair[block, before, left])
        deleted = ~paired & (i > 0) & (here == cost[before, block, j] + _EDIT)
        inserted = going & ~paired & ~deleted
        column[block[paired], before[paired]] = left[paired]
        missing[block[inserted], i[inserted]] += 1
        i = i - (paired | deleted)
        j = j - (paired | inserted)
    return Labels(column, missing)
