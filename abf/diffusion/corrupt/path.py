"""A block at one time of its path: late tokens missing, others masked, some of them wrong.

Each block has its own time tau = -2 log v, v uniform: the integral over tau is then the mean of 2/v
times the integrand, whose second moment is finite (uniform t with weight 1/(1-t) has none;
docs/method.md). Every block ends with the end-of-block slot, before which the last gap lies.

Letters: B batch rows, L row length, M noisy slots of a row, K blocks, n columns and m slots of the
longest block.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abf.data.loader import PackedBatch
from abf.diffusion.config import PathCorruption
from abf.diffusion.corrupt.base import Blocks, lay_out, squeeze
from abf.diffusion.layout import block_lengths, block_starts, positions, predicted
from abf.diffusion.levels import noise_levels
from abf.diffusion.path.law import ABSENT, MASKED, PathLaw
from abf.diffusion.policy.drafts import GRAM, OVERRUN, Finished, draft, opened, own_steps
from abf.diffusion.rng import uniform

_SOON = 1e-12
_STATUS, _TOKEN, _DRAFTED = 2, 3, 4
"""Substreams: what a column holds, which wrong token, which blocks are drafts."""


@dataclass
class PathBlocks(Blocks):
    """Blocks at one time of their paths."""

    tau: NDArray[np.float64]
    """[K] its time."""
    weight: NDArray[np.float64]
    """[K] of the integrand: 2/v, over the share of blocks that are on their path."""
    present: NDArray[np.bool_]
    """[K, n] columns that are in the noisy block."""


@dataclass
class PathNoised:
    """Rows of blocks on their paths, some of them drafts instead."""

    noisy_ids: NDArray[np.int64]
    """[B, M], in 0..V+1."""
    block_start: NDArray[np.int64]
    """[B, M], see `NoisyStream`."""
    law: PathLaw
    path: PathBlocks
    drafts: Blocks
    """Blocks to be edited; they have no part in the bound."""
    draft_share: float
    """Share of blocks that are meant to be drafts; 1 where none are."""
    own_steps: NDArray[np.int64]
    """[drafts] steps that the model is to write each for (`abf.diffusion.policy.own`); 0: none."""
    most_steps: int
    """Most steps that any draft could have."""


class Path:
    """See the module."""

    views = 1

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

        row, start = np.nonzero(block_starts(batch))
        columns = block_lengths(batch)[row, start]
        clean, real = _padded(batch.token_ids, row, start, columns)
        present = _padded(there, row, start, columns)[0] & real
        text, slots = squeeze(_padded(shown, row, start, columns)[0], present, empty=self.mask_id)

        drafted, weight = np.zeros(len(row), dtype=bool), 2 / v[row, start]
        own = np.zeros(len(row), dtype=np.int64)
        if self.cfg.drafts is not None:
            at = batch.document_id[row, start], place[row, start]
            keys = (seed, np.asarray(epochs)[row], *at, draw)
            drafted = uniform(*keys, _DRAFTED) < self.cfg.drafts.share
            weight = weight / (1 - self.cfg.drafts.share)
            own = own_steps(self.cfg.drafts, keys)
            finished = _finished(batch, row, start, clean, columns, back=self.cfg.drafts.back)
            *cells, revised = draft(finished, self.cfg.drafts, keys=keys, vocab=self.mask_id)
            masks = np.where((own > 0) & ~revised, opened(columns, keys), 0)
            drafts = self._drafts(cells, columns, masks)
            text, slots = _either(drafted, drafts, (text, slots), empty=self.mask_id)
        noisy_ids, block_start, first = lay_out(
            row, start, text, slots, rows=B, end_id=self.mask_id + 1
        )
        blocks = PathBlocks(
            row, start, columns, first, slots, clean, text, tau[row, start], weight, present
        )
        cfg = self.cfg.drafts
        share = 1.0 if cfg is None else cfg.share
        most = cfg.own_steps if cfg is not None and cfg.own else 0
        return PathNoised(
            noisy_ids, block_start, self.law, blocks.take(~drafted), blocks.take(drafted), share,
            own[drafted], most,
        )  # fmt: skip

    def _drafts(
        self,
        cells: Sequence[NDArray[Any]],
        columns: NDArray[np.int64],
        masks: NDArray[np.int64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Text and slots of drafts: of their cells and which are there, or so many masks [K] that
        the model is to write."""
        assert self.cfg.drafts is not None
        text, slots = squeeze(cells[0], cells[1], empty=self.mask_id)
        if self.cfg.drafts.fixed_length:
            slots = columns  # MASK pads a text anyway
        text[masks > 0] = self.mask_id
        return text, np.where(masks > 0, masks, slots)


def _either(
    first: NDArray[np.bool_],
    one: tuple[NDArray[np.int64], NDArray[np.int64]],
    other: tuple[NDArray[np.int64], NDArray[np.int64]],
    *,
    empty: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Text and slots of each block: the one's where `first`, else the other's."""
    slots = np.where(first, one[1], other[1])
    width = max(one[0].shape[1], other[0].shape[1], int(slots.max(initial=1)))
    wide = [
        np.pad(text, ((0, 0), (0, width - text.shape[1])), constant_values=empty)
        for text, _ in (one, other)
    ]
    return np.where(first[:, None], *wide), slots


def _finished(
    batch: PackedBatch,
    row: NDArray[np.int64],
    start: NDArray[np.int64],
    clean: NDArray[np.int64],
    columns: NDArray[np.int64],
    *,
    back: int,
) -> Finished:
    """Blocks, what comes before and after them, and what stands near them."""
    L = batch.token_ids.shape[1]
    after = (start + columns)[:, None] + np.arange(OVERRUN)
    at = np.minimum(after, L - 1)
    here = batch.document_id[row, start][:, None]
    same = (after < L) & (batch.document_id[row[:, None], at] == here)
    behind = start[:, None] - GRAM + np.arange(GRAM)
    ahead = np.maximum(behind, 0)
    before = (behind >= 0) & predicted(batch)[row[:, None], ahead]
    before &= batch.document_id[row[:, None], ahead] == here
    # A row begins with its first document's token, and a charged one comes next.
    nearby = np.where(predicted(batch), batch.token_ids, batch.token_ids[:, 1:2])
    number = np.arange(len(row))
    that = np.maximum(number - back, 0)
    apart = (row[that] != row) | (batch.document_id[row, start[that]] != here[:, 0])
    return Finished(
        clean,
        columns,
        following=batch.token_ids[row[:, None], at],
        follows=same.sum(axis=1),
        preceding=batch.token_ids[row[:, None], ahead],
        precedes=before.sum(axis=1),
        nearby=nearby[row],
        earlier=np.where((number < back) | apart, -1, that),
    )


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
