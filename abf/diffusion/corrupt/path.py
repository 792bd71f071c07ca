"""A block at one time of its path: late tokens missing, others masked, some of them wrong.

Each block has its own time tau = -2 log v, v uniform: the integral over tau is then the mean of 2/v
times the integrand, whose second moment is finite (uniform t with weight 1/(1-t) has none;
docs/method.md). Every block ends with the end-of-block slot, before which the last gap lies.

Letters: B batch rows, L row length, M noisy slots of a row, K blocks, n columns and m slots of the
longest block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abf.data.loader import PackedBatch
from abf.diffusion.config import PathCorruption
from abf.diffusion.layout import block_lengths, block_starts, positions, predicted, run_starts
from abf.diffusion.levels import noise_levels
from abf.diffusion.path.law import ABSENT, MASKED, PathLaw
from abf.diffusion.rng import uniform

_SOON = 1e-12
_STATUS, _TOKEN = 2, 3  # substreams: what a column holds, and which wrong token


@dataclass
class PathNoised:
    """Blocks at one time of their paths."""

    noisy_ids: NDArray[np.int64]
    """[B, M], in 0..V+1."""
    block_start: NDArray[np.int64]
    """[B, M], see `NoisyStream`."""
    law: PathLaw
    row: NDArray[np.int64]
    """[K] row of each block."""
    start: NDArray[np.int64]
    """[K] clean slot at which it begins."""
    columns: NDArray[np.int64]
    """[K] its clean tokens."""
    first: NDArray[np.int64]
    """[K] noisy slot at which it begins."""
    slots: NDArray[np.int64]
    """[K] its noisy slots; the end-of-block slot comes after them."""
    tau: NDArray[np.float64]
    """[K] its time."""
    weight: NDArray[np.float64]
    """[K] 2/v: of the integrand."""
    clean: NDArray[np.int64]
    """[K, n] finished tokens."""
    present: NDArray[np.bool_]
    """[K, n] columns that are in the noisy block."""
    text: NDArray[np.int64]
    """[K, m] the noisy block; MASK pads."""


class Path:
    """See the module."""

    def __init__(self, cfg: PathCorruption, *, mask_id: int) -> None:
        self.cfg, self.mask_id = cfg, mask_id
        self.law = PathLaw(cfg.late, cfg.wrong, vocab=mask_id)

    def apply(
        self, batch: PackedBatch, *, seed: int, epochs: NDArray[np.int64], draw: int = 0
    ) -> PathNoised:
        """See `Corrupter.apply`."""
        B, L = batch.token_ids.shape
        charged, place = predicted(batch), positions(batch.document_id)
        level = noise_levels(batch, seed=seed, epochs=epochs, draw=draw, stratify=self.cfg.stratify)
        v = 1 - np.maximum(level, _SOON)  # at time 0 itself no token is right or wrong yet
        tau = -2 * np.log(v)
        epoch = np.broadcast_to(np.asarray(epochs, dtype=np.int64)[:, None], (B, L))
        status, token = (
            uniform(seed, stream, epoch, batch.document_id, place, draw)
            for stream in (_STATUS, _TOKEN)
        )
        held, tokens = self.law.draw(tau, batch.token_ids, status, token)
        there = charged & (held != ABSENT)
        shown = np.where(held == MASKED, self.mask_id, tokens)

        # Where each slot, and behind a block's last token its end, comes to lie.
        length, begins = block_lengths(batch), run_starts(batch.block_id)
        last = charged & (np.arange(L) == begins + length - 1)
        taken = there.astype(np.int64) + last
        column = np.cumsum(taken, axis=1) - taken
        M = max(1, int(taken.sum(axis=1).max()))
        noisy_ids = np.full((B, M), self.mask_id, dtype=np.int64)
        block_start = np.full((B, M), -1, dtype=np.int64)
        at = np.nonzero(there)
        noisy_ids[at[0], column[at]], block_start[at[0], column[at]] = shown[at], begins[at]
        at = np.nonzero(last)
        end = column[at] + there[at]
        noisy_ids[at[0], end], block_start[at[0], end] = self.mask_id + 1, begins[at]

        row, start = np.nonzero(block_starts(batch))
        columns, first = length[row, start], column[row, start]
        clean, real = _padded(batch.token_ids, row, start, columns)
        present = _padded(there, row, start, columns)[0] & real
        slots = present.sum(axis=1)
        text, inside = _padded(noisy_ids, row, first, slots)
        return PathNoised(
            noisy_ids, block_start, self.law, row, start, columns, first, slots,
            tau[row, start], 2 / v[row, start], clean, present,
            np.where(inside, text, self.mask_id),
        )  # fmt: skip


def _padded(
    values: NDArray[Any],
    row: NDArray[np.int64],
    start: NDArray[np.int64],
    length: NDArray[np.int64],
) -> tuple[NDArray[Any], NDArray[np.bool_]]:
    """Values [K, longest] of slots start..start+length-1 of each row, and which of them count."""
    offset = np.arange(max(1, int(length.max(initial=0))))
    inside = offset < length[:, None]
    at = np.where(inside, start[:, None] + offset, 0)
    return values[row[:, None], at], inside


def build(cfg: PathCorruption, *, mask_id: int) -> Path:
    """The corruption of this file."""
    return Path(cfg, mask_id=mask_id)
