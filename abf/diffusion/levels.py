"""How noisy each block is: a level in [0, 1), keyed by counters and spread over blocks and draws.

Letters: B batch rows, L row length.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from abf.data.loader import PackedBatch
from abf.diffusion.layout import run_starts
from abf.diffusion.rng import uniform

_LEVEL = 1  # substream; corruptions number theirs from 2
_GOLDEN = (math.sqrt(5) - 1) / 2
_SILVER = math.sqrt(2) - 1


def noise_levels(
    batch: PackedBatch, *, seed: int, epochs: NDArray[np.int64], draw: int, stratify: bool
) -> NDArray[np.float64]:
    """Noise level of the block that holds each slot, [B, L].

    Stratified, the blocks of a piece (and the draws of a block) are steps of irrational length
    around a circle from one random point: each is uniform by itself, together they are spread.
    """
    number = _block_number(batch)
    epoch = np.broadcast_to(np.asarray(epochs, dtype=np.int64)[:, None], number.shape)
    if not stratify:
        return uniform(seed, _LEVEL, epoch, batch.document_id, number, draw)
    turn = uniform(seed, _LEVEL, epoch, batch.document_id) + number * _GOLDEN + draw * _SILVER
    return turn - np.floor(turn)


def _block_number(batch: PackedBatch) -> NDArray[np.int64]:
    """Number of each slot's block in its piece; the document token is block 0."""
    start = run_starts(batch.block_id)
    ordinal = np.cumsum(start == np.arange(start.shape[1]), axis=1)
    return ordinal - np.take_along_axis(ordinal, run_starts(batch.document_id), axis=1)
