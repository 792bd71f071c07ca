"""Masks only: K of a block's S tokens are hidden, K uniform on 1..S, each weighing S/K.

For one block, E[S/K * sum of CE over a random K-subset] = sum over k of 1/k E[CE sum, K = k], the
bound N_b exactly (notes/training.md §3.3, notes/method_proof.md §4): never an empty block, and a
block of one token is always masked with weight 1, which is the AR target. Dividing by the mask rate
of a Bernoulli draw (EMRS) would give S/(S+1) N_b instead and so misweigh unequal blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from abf.data.loader import PackedBatch
from abf.diffusion.config import MaskedCorruption
from abf.diffusion.corrupt.base import Corrupter, Noised
from abf.diffusion.layout import block_lengths, positions, predicted, run_starts
from abf.diffusion.levels import noise_levels
from abf.diffusion.rng import uniform

_SUBSET = 2  # substream: which slots are masked


class Masked:
    """The K-subset estimator; see the module."""

    def __init__(self, cfg: MaskedCorruption, *, mask_id: int) -> None:
        self.cfg, self.mask_id = cfg, mask_id

    def apply(
        self, batch: PackedBatch, *, seed: int, epochs: NDArray[np.int64], draw: int = 0
    ) -> Noised:
        """See `Corrupter.apply`."""
        B, L = batch.token_ids.shape
        charged = predicted(batch)
        start, length = run_starts(batch.block_id), block_lengths(batch)
        epoch = np.broadcast_to(np.asarray(epochs, dtype=np.int64)[:, None], (B, L))
        level = noise_levels(batch, seed=seed, epochs=epochs, draw=draw, stratify=self.cfg.stratify)
        masks = 1 + np.minimum((level * length).astype(np.int64), length - 1)

        # A slot is masked when fewer than K slots of its block drew a smaller key.
        place = positions(batch.document_id)
        key = uniform(seed, _SUBSET, epoch, batch.document_id, place, draw)
        block = (start + L * np.arange(B)[:, None]).ravel()
        order = np.lexsort((key.ravel(), block))
        rank = np.empty(B * L, dtype=np.int64)
        rank[order] = np.arange(B * L) - block[order]
        masked = charged & (rank.reshape(B, L) < masks)
        return Noised(
            noisy_ids=np.where(masked, self.mask_id, batch.token_ids),
            block_start=np.where(batch.document_id >= 0, start, -1),
            masked=masked,
            weight=np.where(masked, length / masks, 0.0),
        )


def build(cfg: MaskedCorruption, *, mask_id: int) -> Corrupter:
    """The corruption of this file."""
    return Masked(cfg, mask_id=mask_id)
