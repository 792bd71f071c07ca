"""Mask metadata: the ranges of `block_attention`, from per-token ids, by a few linear scans.

Letters: B batch, L tokens of a row. The two-stream layout has rows [noisy ; clean], 2L in all,
and the clean copy of token i is row L + i.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

CleanStream = Literal["context_causal", "block_causal"]


def two_stream_ranges(
    document_id: Tensor, block_id: Tensor, *, clean_stream: CleanStream
) -> Tensor:
    """Ranges of the two-stream training mask over rows [noisy ; clean] of equal length.

    A noisy query sees the clean tokens of its document before its block, and its own noisy block.
    A clean query sees its document's clean tokens up to itself ("context_causal"), or up to the
    end of its block ("block_causal", as BD3-LM). It never sees a noisy token.

    Args:
        document_id: [B,L] integers, non-decreasing, -1 = padding (sees nothing, is never seen).
        block_id: [B,L] integers, non-decreasing, unique in the row: no block spans two documents.
        clean_stream: what the clean stream sees of its own block.

    Returns:
        int32 [B,2L,4], as `block_attention` takes them.

    Raises:
        ValueError: on a wrong shape or dtype, ids that decrease, a block in two documents, or
            padding inside a document.
    """
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
    block_start = _last_start(new_block, index)
    block_end = _next_start(new_block, index)

    ranges = torch.zeros(
        *document_id.shape[:1], 2 * length, 4, dtype=torch.int32, device=document_id.device
    )
    noisy, clean = ranges[:, :length], ranges[:, length:]
    noisy[..., 0] = document_start + length
    noisy[..., 1] = block_start + length
    noisy[..., 2] = block_start
    noisy[..., 3] = block_end
    clean[..., 0] = document_start + length
    clean[..., 1] = (index + 1 if clean_stream == "context_causal" else block_end) + length
    return ranges.mul_(torch.cat((valid, valid), 1).unsqueeze(-1))


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
