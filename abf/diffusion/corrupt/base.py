"""What a corruption takes and gives.

Letters: B batch rows, L row length, M noisy slots of a row, K blocks, n columns (clean tokens) and
m slots of the longest block. MASK is the id V, one past the vocabulary; V+1 is the end of a block,
which only corruptions that change its length set.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, Protocol, Self

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


@dataclass
class Blocks:
    """Noisy blocks beside their finished ones, and where both lie."""

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
    clean: NDArray[np.int64]
    """[K, n] finished tokens."""
    text: NDArray[np.int64]
    """[K, m] the noisy block; MASK pads."""

    def take(self, chosen: NDArray[np.bool_]) -> Self:
        """Some of the blocks, no wider than they need."""
        found = {f.name: getattr(self, f.name)[chosen] for f in fields(self)}
        widths = {
            name: max(1, int(found["slots" if name == "text" else "columns"].max(initial=0)))
            for name, values in found.items()
            if values.ndim == 2
        }
        return type(self)(**{k: v[:, : widths[k]] if k in widths else v for k, v in found.items()})


def squeeze(
    tokens: NDArray[np.int64], there: NDArray[np.bool_], *, empty: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What is there of each line, pushed to the left: tokens [K, m] padded with `empty`, and how
    many [K]."""
    slots = there.sum(axis=1)
    text = np.full((len(tokens), max(1, int(slots.max(initial=0)))), empty, dtype=np.int64)
    line, cell = np.nonzero(there)
    text[line, (there.cumsum(axis=1) - 1)[line, cell]] = tokens[line, cell]
    return text, slots


def lay_out(
    row: NDArray[np.int64],
    start: NDArray[np.int64],
    text: NDArray[np.int64],
    slots: NDArray[np.int64],
    *,
    rows: int,
    end_id: int,
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """Blocks one after another, each with its end.

    Args:
        row: [K] ascending.
        start: [K] clean slot at which a block begins.
        text: [K, m].
        slots: [K] how many of them a block has.
        rows: B.
        end_id: id of the slot behind a block's last; the MASK id is the one before it.

    Returns:
        noisy_ids [B, M], block_start [B, M], and the noisy slot at which each block begins [K].
    """
    before = np.cumsum(slots + 1) - (slots + 1)
    opening = np.searchsorted(row, row)  # first block of the same row
    first = before - before[opening]
    ends = first + slots
    M = int(ends.max(initial=0)) + 1
    noisy_ids = np.full((rows, M), end_id - 1, dtype=np.int64)
    block_start = np.full((rows, M), -1, dtype=np.int64)
    block, slot = np.nonzero(np.arange(text.shape[1]) < slots[:, None])
    noisy_ids[row[block], first[block] + slot] = text[block, slot]
    block_start[row[block], first[block] + slot] = start[block]
    noisy_ids[row, ends], block_start[row, ends] = end_id, start
    return noisy_ids, block_start, first


class Corrupter(Protocol):
    """Turns clean blocks into noisy ones."""

    views: int
    """Draws that belong together: a step trains on draws 0..views-1 of its rows."""

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
