"""What a corruption takes and gives.

Letters: B batch rows, L row length, M noisy slots of a row. MASK is the id V, one past the
vocabulary; V+1 is the end of a block, which only corruptions that change its length set.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from abf.base import build
from abf.data.loader import PackedBatch
from abf.diffusion.config import Corruption


class NoisyStream(Protocol):
    """What the model reads beside the clean tokens."""

    noisy_ids: NDArray[np.int64]
    """[B, M], in 0..V+1."""
    block_start: NDArray[np.int64]
    """[B, M], clean slot at which the block of a noisy slot begins; -1 pads."""


@dataclass
class Noised:
    """Blocks of which tokens are masked, each slot in its place (M = L)."""

    noisy_ids: NDArray[np.int64]
    """[B, L], in 0..V."""
    block_start: NDArray[np.int64]
    """[B, L], see `NoisyStream`."""
    masked: NDArray[np.bool_]
    """[B, L], slots to predict."""
    weight: NDArray[np.float64]
    """[B, L], weight of each predicted slot's cross-entropy in the bound; 0 elsewhere."""


class Corrupter(Protocol):
    """Turns clean blocks into noisy ones."""

    def apply(
        self, batch: PackedBatch, *, seed: int, epochs: NDArray[np.int64], draw: int = 0
    ) -> Any:
        """Noise a batch.

        Noise is keyed by (seed, epoch, piece, place in the piece, draw), so it does not depend on
        the batch, the rank or the worker.

        Args:
            batch: clean rows.
            seed: seed of the run.
            epochs: [B], how often each row has been seen before.
            draw: number of the noise draw, for several draws of the same text.
        """
        ...


def build_corruption(cfg: Corruption, *, mask_id: int) -> Corrupter:
    """The corruption that `cfg.kind` names; `mask_id` is the model's MASK input id (V)."""
    return build(cfg, room="abf.diffusion.corrupt", mask_id=mask_id)
