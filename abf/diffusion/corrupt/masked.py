"""Masks only: some of a block's S tokens are hidden, each in its place.

By default K is uniform on 1..S and each masked token weighs S/K. For one block, E[S/K * sum of CE
over a random K-subset] = sum over k of 1/k E[CE sum, K = k], the bound N_b exactly
(notes/training.md §3.3, notes/method_proof.md §4): never an empty block, and a block of one token
is always masked with weight 1, which is the AR target. Under any other law q of K the weight
1/(k q(k)) keeps that (in a pair of complementary views 1/(k c(k)), c(k) = q(k) + q(S-k)). The
weights that published systems use instead are other objectives: 1/rate with clipped rates (BD3-LM),
S/K with a drawn rate (EMRS, SDAR-VL), which gives S/(S+1) N_b and so misweighs unequal blocks.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import special, stats

from abf.data.loader import PackedBatch
from abf.diffusion.config import BetaRate, CountLaw, MaskedCorruption, MaskLaw, UniformRate
from abf.diffusion.corrupt.base import Corrupter, Noised
from abf.diffusion.layout import block_lengths, positions, predicted, run_starts
from abf.diffusion.levels import noise_levels
from abf.diffusion.rng import uniform

_SUBSET = 2  # substream: which slots are masked


def rate_bounds(law: UniformRate, length: NDArray[np.int64]) -> tuple[NDArray[np.float64], ...]:
    """Lowest and highest rate of blocks of these lengths."""
    low, high = np.full(length.shape, law.low), np.full(length.shape, law.high)
    for clip in reversed(law.by_length):
        low[length <= clip.up_to], high[length <= clip.up_to] = clip.low, clip.high
    return low, high


def count_law(law: MaskLaw, size: int) -> NDArray[np.float64]:
    """q(k): probability of k = 0..S masks in a block of S = `size` tokens."""
    k = np.arange(size + 1)
    if isinstance(law, CountLaw):
        return np.where(k > 0, 1 / size, 0.0)
    if isinstance(law, BetaRate):
        a = law.mean * law.concentration
        return stats.betabinom.pmf(k, size, a, law.concentration - a)
    low, high = (float(bound[0]) for bound in rate_bounds(law, np.array([size])))
    # C(S,k) times the integral of t^k (1-t)^(S-k): an incomplete Beta function over S+1.
    below = special.betainc(k + 1, size - k + 1, high) - special.betainc(k + 1, size - k + 1, low)
    return below / ((size + 1) * (high - low))


class Masked:
    """See the module."""

    def __init__(self, cfg: MaskedCorruption, *, mask_id: int) -> None:
        self.cfg, self.mask_id = cfg, mask_id
        self.views = 2 if cfg.pair else 1
        counted = cfg.law.kind == "count" and not cfg.pair
        self._by_share = cfg.weight == "realised" or counted
        self._exact: dict[int, NDArray[np.float64]] = {}

    def apply(
        self, batch: PackedBatch, *, seed: int, epochs: NDArray[np.int64], draw: int = 0
    ) -> Noised:
        """See `Corrupter.apply`; of a pair, draws 2j and 2j+1 are complements."""
        draw, view = divmod(draw, self.views)
        charged = predicted(batch)
        start, length = run_starts(batch.block_id), block_lengths(batch)
        level = self._levels(batch, seed=seed, epochs=epochs, draw=draw)
        epoch = np.broadcast_to(np.asarray(epochs, dtype=np.int64)[:, None], charged.shape)
        place = positions(batch.document_id)
        key = uniform(seed, _SUBSET, epoch, batch.document_id, place, draw)
        law = self.cfg.law
        if isinstance(law, CountLaw):
            # A slot is masked when fewer than K slots of its block drew a smaller key.
            masks = 1 + np.minimum((level * length).astype(np.int64), length - 1)
            masked, rate = charged & (_ranks(key, start) < masks), masks / length
        else:
            if isinstance(law, BetaRate):
                a = law.mean * law.concentration
                rate = stats.beta.ppf(level, a, law.concentration - a)
            else:
                low, high = rate_bounds(law, length)
                rate = low + level * (high - low)
            masked = charged & (key < rate)
        if view:
            masked = charged & ~masked
        return Noised(
            noisy_ids=np.where(masked, self.mask_id, batch.token_ids),
            block_start=np.where(batch.document_id >= 0, start, -1),
            masked=masked,
            weight=np.where(masked, self._weights(masked, start, length, rate), 0.0),
        )

    def _levels(
        self, batch: PackedBatch, *, seed: int, epochs: NDArray[np.int64], draw: int
    ) -> NDArray[np.float64]:
        """[B, L] uniform numbers that decide how noisy a slot's block is."""
        level = noise_levels(batch, seed=seed, epochs=epochs, draw=draw, stratify=self.cfg.stratify)
        if self.cfg.shared == "document":
            return np.take_along_axis(level, run_starts(batch.document_id), axis=1)
        return level

    def _weights(
        self,
        masked: NDArray[np.bool_],
        start: NDArray[np.int64],
        length: NDArray[np.int64],
        rate: NDArray[np.float64],
    ) -> NDArray[np.float64]:
        """[B, L] weight of each slot's loss; read where it is masked."""
        if self.cfg.weight == "one":
            return np.ones(masked.shape)
        if self.cfg.weight == "rate":
            return 1 / np.maximum(rate, 1e-12)
        B, L = masked.shape
        flat = start + L * np.arange(B)[:, None]
        count = np.bincount(flat.ravel(), weights=masked.ravel(), minlength=B * L)[flat]
        count = np.maximum(count.astype(np.int64), 1)
        if self._by_share:
            return length / count
        weight = np.ones(masked.shape)
        for size in np.unique(length[masked]):
            here = masked & (length == size)
            weight[here] = self._of_count(int(size))[count[here]]
        return weight

    def _of_count(self, size: int) -> NDArray[np.float64]:
        """Exact weight of k = 0..S masks in a block of S = `size` tokens."""
        if size not in self._exact:
            law = count_law(self.cfg.law, size)
            chance = law + law[::-1] if self.cfg.pair else law
            k = np.arange(size + 1)
            self._exact[size] = 1 / np.where(k > 0, np.maximum(k * chance, 1e-300), np.inf)
        return self._exact[size]


def _ranks(key: NDArray[np.float64], start: NDArray[np.int64]) -> NDArray[np.int64]:
    """[B, L] how many slots of the same block drew a smaller key."""
    B, L = key.shape
    block = (start + L * np.arange(B)[:, None]).ravel()
    order = np.lexsort((key.ravel(), block))
    rank = np.empty(B * L, dtype=np.int64)
    rank[order] = np.arange(B * L) - block[order]
    return rank.reshape(B, L)


def build(cfg: MaskedCorruption, *, mask_id: int) -> Corrupter:
    """The corruption of this file."""
    return Masked(cfg, mask_id=mask_id)
