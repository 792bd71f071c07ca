"""Rows as the model reads them: positions, blocks, the two streams, and where a token is read from.

Letters: B batch rows, L row length, R predicted slots. A batch is a `PackedBatch`: token_ids,
block_id and document_id, int64 [B, L]; the first token of a piece is its document token (context
only), padding has document_id -1. In the two-stream layout rows 0..L-1 are noisy, L..2L-1 clean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from abf_kernels.block_attention.metadata import CleanStream, causal_ranges, two_stream_ranges
from numpy.typing import NDArray
from torch import Tensor

from abf.data.loader import PackedBatch
from abf.diffusion.corrupt.base import Noised


def run_starts(ids: NDArray[np.int64]) -> NDArray[np.int64]:
    """Index where the run of equal ids that holds each slot begins, [B, L]."""
    B, L = ids.shape
    first = np.ones((B, L), dtype=bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    return np.maximum.accumulate(np.where(first, np.arange(L), 0), axis=1)


def positions(document_id: NDArray[np.int64]) -> NDArray[np.int64]:
    """Position of each slot in its piece, [B, L]; the document token is 0, so is all padding."""
    offsets = np.arange(document_id.shape[1]) - run_starts(document_id)
    return np.where(document_id >= 0, offsets, 0)


def predicted(batch: PackedBatch) -> NDArray[np.bool_]:
    """Slots a likelihood charges for, [B, L]: no padding, no document token that opens a piece."""
    return positions(batch.document_id) > 0


def block_starts(batch: PackedBatch) -> NDArray[np.bool_]:
    """First slot of each block that is charged for, [B, L]."""
    L = batch.block_id.shape[1]
    return predicted(batch) & (run_starts(batch.block_id) == np.arange(L))


def block_lengths(batch: PackedBatch) -> NDArray[np.int64]:
    """Length in tokens of the block that holds each slot, [B, L]."""
    B, L = batch.block_id.shape
    flat = run_starts(batch.block_id) + L * np.arange(B)[:, None]
    return np.bincount(flat.ravel(), minlength=B * L)[flat]


@dataclass
class Reads:
    """Which state predicts what."""

    readout: Tensor
    """[R] int64, flat row of the state: in B*2L, or in B*L of a clean stream alone."""
    target: Tensor
    """[R] int64: token id, or block length - 1."""
    slot: Tensor
    """[R] int64, flat index in B*L of the slot predicted (a block's first slot for lengths)."""


@dataclass
class TwoStream:
    """Noisy and clean stream side by side, and where each masked slot is read."""

    ids: Tensor
    """[B, 2L] int64; MASK is V."""
    positions: Tensor
    """[B, 2L] int64; the two copies of a token share theirs."""
    ranges: Tensor
    """[B, 2L, 4] key ranges of each row."""
    reads: Reads
    """The masked slots."""
    weight: Tensor
    """[R] float64, weight of each in the bound."""


def two_stream(
    batch: PackedBatch, noised: Noised, *, shift: bool, clean_stream: CleanStream
) -> TwoStream:
    """Lay out noisy and clean tokens, with the read-out of every masked slot.

    With `shift`, a token is read from the state before it: the first slot of a block from the
    *clean* row before it (the noisy one belongs to another, corrupted block), later slots from the
    noisy row before them. Blocks of length 1 are then exactly the AR model. Without it, a slot is
    read from its own noisy row.
    """
    L = batch.token_ids.shape[1]
    row, slot = np.nonzero(noised.masked)
    if shift:
        first = block_starts(batch)[row, slot]
        readout = row * 2 * L + slot - 1 + np.where(first, L, 0)
    else:
        readout = row * 2 * L + slot
    place = positions(batch.document_id)
    return TwoStream(
        ids=torch.from_numpy(np.concatenate([noised.noisy_ids, batch.token_ids], axis=1)),
        positions=torch.from_numpy(np.concatenate([place, place], axis=1)),
        ranges=two_stream_ranges(
            torch.from_numpy(batch.document_id),
            torch.from_numpy(batch.block_id),
            clean_stream=clean_stream,
        ),
        reads=_reads(readout, batch.token_ids, row, slot),
        weight=torch.from_numpy(noised.weight[row, slot]),
    )


def clean_ranges(batch: PackedBatch) -> Tensor:
    """Key ranges [B, L, 4] of the clean stream alone, causal inside each piece."""
    return causal_ranges(torch.from_numpy(batch.document_id))


def next_token_reads(batch: PackedBatch, *, streams: int) -> Reads:
    """Every charged slot, read from the clean row before it: the AR model's view."""
    return _clean_reads(predicted(batch), batch.token_ids, streams)


def length_reads(batch: PackedBatch) -> Reads:
    """Length of every charged block, read from the clean row before it (two streams)."""
    return _clean_reads(block_starts(batch), block_lengths(batch) - 1, 2)


def _clean_reads(where: NDArray[np.bool_], target: NDArray[np.int64], streams: int) -> Reads:
    assert streams in (1, 2)
    L = where.shape[1]
    row, slot = np.nonzero(where)
    clean = L if streams == 2 else 0
    return _reads(row * streams * L + clean + slot - 1, target, row, slot)


def _reads(
    readout: NDArray[np.int64],
    target: NDArray[np.int64],
    row: NDArray[np.int64],
    slot: NDArray[np.int64],
) -> Reads:
    return Reads(
        readout=torch.from_numpy(readout),
        target=torch.from_numpy(target[row, slot]),
        slot=torch.from_numpy(row * target.shape[1] + slot),
    )
