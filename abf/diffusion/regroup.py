"""Blocks of another granularity than the packed one: cut to a cap, or joined at random.

A curriculum of block lengths trains on the packed rows themselves: a cap cuts a block at multiples
of it, counted from the block's start, so that the blocks of cap 4 are parts of those of cap 8 when
these are nested (powers of two), and of the packed ones in any case. Blocks that were cut for one
step are whole again at the next cap: adjacent pieces merge, as in BARD (arXiv 2604.16514) and
NBDiff (arXiv 2512.06776), and at semantic boundaries here. Random joining lets one model meet
several granularities. Nothing crosses a document, and its opening token stays apart.

Letters: B batch rows, L row length.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from abf.data.loader import PackedBatch
from abf.diffusion.layout import positions, run_starts
from abf.diffusion.rng import uniform

_JOIN = 32
"""Substream of random numbers."""


def regroup(
    batch: PackedBatch,
    *,
    cap: int | None,
    join: float,
    longest: int,
    seed: int,
    epochs: NDArray[np.int64],
) -> PackedBatch:
    """The same tokens in other blocks.

    Args:
        batch: packed rows.
        cap: longest block, in tokens; None leaves blocks whole.
        join: probability that a block is joined to the one before it, as long as both together have
            at most `longest` tokens.
        longest: see `join`.
        seed: of the run.
        epochs: [B] how often each row has been seen before.
    """
    if cap is None and not join:
        return batch
    L = batch.block_id.shape[1]
    begins = run_starts(batch.block_id)
    inside = np.arange(L) - begins
    place = positions(batch.document_id)
    first = inside == 0
    if cap is not None:
        first |= inside % cap == 0
    if join:
        first &= ~_joined(batch, first, place, join=join, longest=longest, seed=seed, epochs=epochs)
    block_id = np.where(batch.document_id >= 0, first.cumsum(axis=1) - 1, -1)
    return dataclasses.replace(batch, block_id=block_id)


def _joined(
    batch: PackedBatch,
    first: NDArray[np.bool_],
    place: NDArray[np.int64],
    *,
    join: float,
    longest: int,
    seed: int,
    epochs: NDArray[np.int64],
) -> NDArray[np.bool_]:
    """[B, L] first slots of blocks that become part of the block before them."""
    L = first.shape[1]
    epoch = np.broadcast_to(np.asarray(epochs, dtype=np.int64)[:, None], first.shape)
    asked = uniform(seed, _JOIN, epoch, batch.document_id, place) < join
    # The first block of a document has its opening token before it.
    asked &= first & (place > 1)
    found = np.zeros_like(first)
    for row, wanted in enumerate(asked):
        starts = np.flatnonzero(first[row])
        ends = np.append(starts[1:], L)
        held = 0  # tokens of the block being built
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if wanted[start] and held + end - start <= longest:
                found[row, start] = True
                held += end - start
            else:
                held = end - start
    return found
