"""Mask metadata: the ranges of `block_attention`, from per-token ids, by a few linear scans.

Letters: B batch, L tokens of a row, M slots of a noisy row. The two-stream layout has rows
[noisy ; clean], M + L in all, and token i is clean row M + i.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

CleanStream = Literal["context_causal", "block_causal"]


def two_stream_ranges(
    document_id: Tensor,
    block_id: Tensor,
    *,
    clean_stream: CleanStream,
    block_start: Tensor | None = None,
    dropped: Tensor | None = None,
    sinks: int = 0,
) -> Tensor:
    """Ranges of the two-stream training mask over rows [noisy ; clean].

    A noisy query sees the clean tokens of its document before its block, and its own noisy block.
    A clean query sees its document's clean tokens up to itself ("context_causal"), or up to the
    end of its block ("block_causal", as BD3-LM). It never sees a noisy token. Of what lies before
    its block, a query of a *dropped* block, noisy or clean, sees the document's sinks alone: two
    ranges still say it all, and the kernels know nothing of it.

    Args:
        document_id: [B,L] integers, non-decreasing, -1 = padding (sees nothing, is never seen).
        block_id: [B,L] integers, non-decreasing, unique in the row: no block spans two documents.
        clean_stream: what the clean stream sees of its own block.
        block_start: [B,M] integers, the clean token with which the block of a noisy slot begins,
            -1 = padding; equal neighbours are one noisy block, of whatever length. By default every
            token has its noisy copy (M = L).
        dropped: bool [B,L], one value a block: which blocks lose what lies before them (block
            dropout, arXiv 2605.15913).
        sinks: how many first tokens of a document its dropped blocks go on seeing.

    Returns:
        int32 [B,M+L,4], as `block_attention` takes them.

    Raises:
        ValueError: on a wrong shape or dtype, ids that decrease, a block in two documents, padding
            inside a document, a noisy block that begins where no clean block does, a block that is
            dropped in part, or a negative number of sinks.
    """
    if sinks < 0:
        raise ValueError(f"sinks must be 0 or more; got {sinks}")
    if clean_stream not in get_args(CleanStream):
        allowed = ", ".join(get_args(CleanStream))
        raise ValueError(f"clean_stream must be one of {allowed}; got {clean_stream!r}")
    new_document = _document_starts(document_id)
    _check_ids("block_id", block_id)
    if block_id.shape != document_id.shape:
        raise ValueError(
            f"block_id must have document_id's shape {tuple(document_id.shape)}; "
            f"got {tuple(block_id.shape)}"
        )
    length = document_id.shape[1]
    valid = document_id >= 0
    lowest = torch.iinfo(block_id.dtype).min
    so_far = torch.where(valid, block_id, lowest).cummax(1).values
    if bool((valid & (block_id < so_far)).any()):
        raise ValueError("block_id must not decrease along a row")
    spans = valid[:, 1:] & new_document[:, 1:] & (block_id[:, 1:] == so_far[:, :-1])
    if bool(spans.any()):
        raise ValueError("block_id must differ between documents: a block spans two of them")

    new_block = new_document.clone()
    new_block[:, 1:] |= block_id[:, 1:] != block_id[:, :-1]
    index = torch.arange(length, dtype=torch.int32, device=document_id.device)
    document_start = _last_start(new_document, index)
    block_end, own_start = _next_start(new_block, index), _last_start(new_block, index)
    # What lies before its block reaches to `known`, its own block begins at `own`: equal, unless it
    # is dropped.
    known = own_start
    if dropped is not None:
        _check_dropped(dropped, document_id, own_start)
        known = torch.where(dropped, (document_start + sinks).minimum(own_start), own_start)
    if block_start is None:
        block_start = own_start.masked_fill(~valid, -1)
    else:
        _check_starts(block_start, valid & new_block)
    noisy_valid, slots = block_start >= 0, block_start.shape[1]
    new_noisy = torch.ones_like(noisy_valid)
    new_noisy[:, 1:] = block_start[:, 1:] != block_start[:, :-1]
    column = torch.arange(slots, dtype=torch.int32, device=document_id.device)

    ranges = torch.zeros(
        len(document_id), slots + length, 4, dtype=torch.int32, device=document_id.device
    )
    noisy, clean = ranges[:, :slots], ranges[:, slots:]
    begins = block_start.clamp(min=0).long()
    noisy[..., 0] = document_start.gather(1, begins) + slots
    noisy[..., 1] = known.gather(1, begins) + slots
    noisy[..., 2] = _last_start(new_noisy, column)
    noisy[..., 3] = _next_start(new_noisy, column)
    clean[..., 0] = document_start + slots
    seen = index + 1 if clean_stream == "context_causal" else block_end
    clean[..., 1] = seen + slots
    if dropped is not None:
        apart = known < own_start
        clean[..., 1] = torch.where(apart, known, seen) + slots
        clean[..., 2] = torch.where(apart, own_start + slots, 0)
        clean[..., 3] = torch.where(apart, seen + slots, 0)
    return ranges.mul_(torch.cat((noisy_valid, valid), 1).unsqueeze(-1))


def causal_ranges(document_id: Tensor) -> Tensor:
    """Ranges of ordinary causal attention within each document of packed rows.

    Args:
        document_id: [B,L] integers, non-decreasing, -1 = padding (sees nothing, is never seen).

    Returns:
        int32 [B,L,4]: [document start, position + 1) and an empty second range.

    Raises:
        ValueError: on a wrong shape or dtype, ids that decrease, or padding inside a document.
    """
    new_document = _document_starts(document_id)
    index = torch.arange(document_id.shape[1], dtype=torch.int32, device=document_id.device)
    ranges = torch.zeros(*document_id.shape, 4, dtype=torch.int32, device=document_id.device)
    ranges[..., 0] = _last_start(new_document, index)
    ranges[..., 1] = index + 1
    return ranges.mul_((document_id >= 0).unsqueeze(-1))


def _check_ids(name: str, ids: Tensor) -> None:
    if ids.ndim != 2 or ids.shape[1] == 0:
        raise ValueError(f"{name} must have shape [batch, tokens >= 1]; got {tuple(ids.shape)}")
    if ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64; got {ids.dtype}")


def _check_starts(block_start: Tensor, begins: Tensor) -> None:
    """Noisy blocks begin where clean ones do, in their order, and padding comes last."""
    _check_ids("block_start", block_start)
    if len(block_start) != len(begins):
        raise ValueError(
            f"block_start must have {len(begins)} rows; got {tuple(block_start.shape)}"
        )
    real = block_start >= 0
    if bool((real[:, 1:] & (block_start[:, 1:] < block_start[:, :-1])).any()) or bool(
        (real[:, 1:] & ~real[:, :-1]).any()
    ):
        raise ValueError("block_start must not decrease along a row; -1 only pads its end")
    inside = block_start < begins.shape[1]
    at = block_start.clamp(0, begins.shape[1] - 1).long()
    if bool((real & ~(inside & begins.gather(1, at))).any()):
        raise ValueError("block_start must name the first token of a clean block")


def _check_dropped(dropped: Tensor, document_id: Tensor, own_start: Tensor) -> None:
    if dropped.dtype != torch.bool or dropped.shape != document_id.shape:
        raise ValueError(
            f"dropped must be bool of document_id's shape {tuple(document_id.shape)}; got "
            f"{dropped.dtype} {tuple(dropped.shape)}"
        )
    parts = (dropped != dropped.gather(1, own_start.long())) & (document_id >= 0)
    if bool(parts.any()):
        row, token = parts.nonzero()[0].tolist()
        raise ValueError(
            f"dropped must be one value a block; it changes inside one at row {row}, token {token}"
        )


def _document_starts(document_id: Tensor) -> Tensor:
    """Bool [B,L]: true at each document's first token and wherever padding begins."""
    _check_ids("document_id", document_id)
    # Over valid tokens ids do not decrease, so the running maximum is the last valid id so far.
    so_far = document_id.cummax(1).values
    if bool(((document_id < so_far) & (document_id >= 0)).any()):
        raise ValueError("document_id must not decrease along a row")
    starts = torch.ones_like(document_id, dtype=torch.bool)
    torch.ne(document_id[:, 1:], document_id[:, :-1], out=starts[:, 1:])
    resumed = starts[:, 1:] & (document_id[:, 1:] >= 0) & (document_id[:, 1:] == so_far[:, :-1])
    if bool(resumed.any()):
        raise ValueError("document_id must not have padding (-1) inside a document")
    return starts


def _last_start(starts: Tensor, index: Tensor) -> Tensor:
    """[B,L] index of the latest true at or before each position (position 0 is always true)."""
    return (starts * index).cummax(1).values


def _next_start(starts: Tensor, index: Tensor) -> Tensor:
    """[B,L] index of the first true after each position, L where there is none."""
    length = index.numel()
    following = torch.where(starts, index, length)
    following = torch.cat((following[:, 1:], following.new_full((len(starts), 1), length)), 1)
    return following.flip(1).cummin(1).values.flip(1)
