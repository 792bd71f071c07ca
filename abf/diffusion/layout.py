"""Rows as the model reads them: positions, blocks, the two streams, and where a token is read from.

Letters: B batch rows, L row length, M noisy slots of a row, R predicted slots, K blocks, m slots of
the longest block. A batch is a
`PackedBatch`: token_ids, block_id and document_id, int64 [B, L]; the first token of a piece is its
document token (context only), padding has document_id -1. In the two-stream layout rows 0..M-1 are
noisy, M..M+L-1 clean; a noisy block may be longer or shorter than the clean one.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from abf_kernels.block_attention.metadata import CleanStream, causal_ranges, two_stream_ranges
from numpy.typing import NDArray
from torch import Tensor

from abf.data.loader import PackedBatch
from abf.diffusion.corrupt.base import Blocks, Noised, NoisyStream


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
    """[R] int64, flat row of the state: in B*(M+L), or in B*L of a clean stream alone."""
    target: Tensor
    """[R] int64: token id, or block length."""
    slot: Tensor
    """[R] int64, flat index in B*L of the slot predicted (a block's first slot for lengths)."""


@dataclass
class TwoStream:
    """Noisy and clean stream side by side."""

    ids: Tensor
    """[B, M+L] int64; MASK is V, the end of a block V+1."""
    positions: Tensor
    """[B, M+L] int64; slot j of a noisy block has the position of its block's clean token j, and
    goes on counting behind the last one: how long a noisy block is tells nothing of the clean."""
    ranges: Tensor
    """[B, M+L, 4] key ranges of each row."""
    noisy: int
    """M."""
    granularity: Tensor | None
    """[B, M+L] int64, as in `PackedBatch`: of the noisy slots; clean ones are told nothing, so that
    they stay the AR model's."""


def two_stream(batch: PackedBatch, noised: NoisyStream, *, clean_stream: CleanStream) -> TwoStream:
    """Lay out noisy and clean tokens."""
    place, start = positions(batch.document_id), noised.block_start
    M = start.shape[1]
    begins = np.take_along_axis(place, np.maximum(start, 0), axis=1)
    inside = np.arange(M) - run_starts(start)
    noisy_place = np.where(start >= 0, begins + inside, 0)
    return TwoStream(
        ids=torch.as_tensor(np.concatenate([noised.noisy_ids, batch.token_ids], axis=1)),
        positions=torch.as_tensor(np.concatenate([noisy_place, place], axis=1)),
        ranges=two_stream_ranges(
            torch.as_tensor(batch.document_id),
            torch.as_tensor(batch.block_id),
            clean_stream=clean_stream,
            block_start=torch.as_tensor(start),
            dropped=None if batch.dropped is None else torch.as_tensor(batch.dropped),
            sinks=batch.sinks,
        ),
        noisy=M,
        granularity=_noisy_granularity(batch, start),
    )


def one_stream(batch: PackedBatch) -> TwoStream:
    """The clean tokens alone, causal inside each piece: the AR model's rows."""
    return TwoStream(
        ids=torch.as_tensor(batch.token_ids),
        positions=torch.as_tensor(positions(batch.document_id)),
        ranges=clean_ranges(batch),
        noisy=0,
        granularity=None,
    )


def _noisy_granularity(batch: PackedBatch, start: NDArray[np.int64]) -> Tensor | None:
    if batch.granularity is None:
        return None
    of_block = np.take_along_axis(batch.granularity, np.maximum(start, 0), axis=1)
    nothing = np.full_like(batch.granularity, -1)
    return torch.as_tensor(np.concatenate([np.where(start >= 0, of_block, -1), nothing], axis=1))


def mask_reads(batch: PackedBatch, noised: Noised, *, shift: bool) -> Reads:
    """Where every masked slot is read.

    With `shift`, a token is read from the state before it: the first slot of a block from the
    *clean* row before it (the noisy one belongs to another, corrupted block), later slots from the
    noisy row before them. Blocks of length 1 are then exactly the AR model. Without it, a slot is
    read from its own noisy row.
    """
    L = batch.token_ids.shape[1]
    row, slot = np.nonzero(noised.masked)
    readout = row * 2 * L + slot
    if shift:
        readout += np.where(block_starts(batch)[row, slot], L, 0) - 1
    return _reads(readout, batch.token_ids, row, slot)


@dataclass
class BlockReads:
    """Rows to read of whole noisy blocks, in B*(M+L), and the blocks they belong to."""

    token: Tensor
    """[R] row that tells the token of a slot."""
    own: Tensor
    """[K*(m+1)] row of each slot and of the end; of the end where there is no slot."""
    block: Tensor
    """[R] block of each slot."""
    slot: Tensor
    """[R] its number in the block."""

    ends: Tensor
    """[K] row of each end."""

    @property
    def rows(self) -> Tensor:
        """All rows, tokens first."""
        return torch.cat((self.token, self.own))


def block_reads(blocks: Blocks, *, noisy: int, L: int, shift: bool) -> BlockReads:
    """Tokens are read from the state before their slot (`shift`; the first from the last clean
    token before the block) or from their own, edits always from a slot's own state."""
    base = torch.as_tensor(blocks.row) * (noisy + L)
    slots, first = torch.as_tensor(blocks.slots), torch.as_tensor(blocks.first)
    m = blocks.text.shape[1]
    block, slot = torch.nonzero(torch.arange(m) < slots[:, None], as_tuple=True)
    token = base[block] + first[block] + slot
    if shift:
        before = base[block] + noisy + torch.as_tensor(blocks.start)[block] - 1
        token = torch.where(slot == 0, before, token - 1)
    place = torch.minimum(torch.arange(m + 1), slots[:, None])
    own = (base + first)[:, None] + place
    return BlockReads(token, own.flatten(), block, slot, base + first + slots)


def clean_ranges(batch: PackedBatch) -> Tensor:
    """Key ranges [B, L, 4] of the clean stream alone, causal inside each piece."""
    return causal_ranges(torch.as_tensor(batch.document_id))


def next_token_reads(batch: PackedBatch, *, noisy: int) -> Reads:
    """Every charged slot, read from the clean row before it, behind `noisy` noisy ones: the AR
    model's view."""
    return _clean_reads(predicted(batch), batch.token_ids, noisy)


def length_reads(batch: PackedBatch, *, noisy: int) -> Reads:
    """Length of every charged block, read from the clean row before it."""
    return _clean_reads(block_starts(batch), block_lengths(batch), noisy)


def _clean_reads(where: NDArray[np.bool_], target: NDArray[np.int64], noisy: int) -> Reads:
    row, slot = np.nonzero(where)
    return _reads(row * (noisy + where.shape[1]) + noisy + slot - 1, target, row, slot)


def _reads(
    readout: NDArray[np.int64],
    target: NDArray[np.int64],
    row: NDArray[np.int64],
    slot: NDArray[np.int64],
) -> Reads:
    return Reads(
        readout=torch.as_tensor(readout),
        target=torch.as_tensor(target[row, slot]),
        slot=torch.as_tensor(row * target.shape[1] + slot),
    )
