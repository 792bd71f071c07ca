"""Requests side by side in one forward pass: rows sent, rows read, and who sees whom.

Letters: B requests, M rows of the longest, R rows read, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abf.decode.request import RequestState
from abf.model.attention import CacheAttend
from abf.model.cache import KVCache
from abf.model.config import AttentionBackend


class MixedAttend(CacheAttend):
    """Cached attention in which each request's own rows are causal or not: `causal` [B] bool."""

    def __init__(
        self, cache: KVCache, *, query_lengths: Tensor, causal: Tensor, backend: AttentionBackend
    ) -> None:
        super().__init__(cache, query_lengths=query_lengths, own="block", backend=backend)
        self._causal = causal
        self._ordered = CacheAttend(
            cache, query_lengths=query_lengths, own="causal", backend=backend
        )

    def ranges(self, rows: int) -> Tensor:
        """[B, rows, 4]: of each request, its causal or its whole-block ranges."""
        chosen = self._causal[:, None, None]
        return torch.where(chosen, self._ordered.ranges(rows), super().ranges(rows))


@dataclass
class Batch:
    """Requests and what the engine keeps of them; row b of every tensor is requests[b]'s."""

    requests: list[RequestState]
    cache: KVCache
    last_state: Tensor
    """[B, d] state of the last committed token."""
    last_logits: Tensor
    """[B, V] float32, its next-token logits."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these requests stay, in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.last_state.device)
        self.requests = [self.requests[row] for row in rows]
        self.cache.select(index)
        self.last_state, self.last_logits = self.last_state[index], self.last_logits[index]


def pad(
    rows: Sequence[Sequence[int] | NDArray[np.int32]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Rows of ids -> [B, M] int64 padded with 0, and their lengths [B]."""
    lengths = np.array([len(row) for row in rows])
    ids = np.zeros((len(rows), lengths.max()), dtype=np.int64)
    ids[np.arange(ids.shape[1]) < lengths[:, None]] = np.concatenate(rows)
    return torch.from_numpy(ids).to(device), torch.from_numpy(lengths).to(device)


@dataclass(frozen=True)
class Layout:
    """What one forward pass computes. Rows of a pass that are read are numbered 0..R-1 in order;
    number R + b stands for the last committed token of request b, known from an earlier pass."""

    sent: list[NDArray[np.int32]]
    """Ids of each request's rows."""
    read: NDArray[np.intp]
    """[R] flat rows in B*M whose states are needed."""
    which: NDArray[np.intp]
    """[masked slots] request of each masked slot."""
    slot: NDArray[np.intp]
    """[masked slots] its place in the block."""
    source: NDArray[np.intp]
    """[masked slots] number of the row that predicts it."""
    closing: list[int]
    """Requests whose closed block is written."""
    audit: NDArray[np.intp]
    """[delivered tokens] number of the row that predicts each as an AR model."""
    last: NDArray[np.intp]
    """[closing] number of each closing request's last row."""


def layout(requests: Sequence[RequestState], *, shift: bool, end_id: int | None = None) -> Layout:
    """Rows of the next forward pass; an open block ends with `end_id` where the model knows one.

    A masked slot is read from its own row or, with `shift`, from the row before it; a block's first
    slot then from the last committed token (`abf.diffusion.layout.two_stream` in training).
    """
    reads, which, slots, sources, closing, audits, lasts = ([] for _ in range(7))
    sent = [_ids(state, end_id) for state in requests]
    number, width = 0, max(len(ids) for ids in sent)
    before = sum(_count(state, shift) for state in requests)
    for row, (state, ids) in enumerate(zip(requests, sent, strict=True)):
        if state.closing is not None:
            read = np.arange(len(ids))
            closing.append(row)
            audits.append(np.concatenate([[before + row], number + read[:-1]]))
            lasts.append(number + len(ids) - 1)
        else:
            assert state.block is not None
            masked = state.block.masked()
            inside = masked > 0 if shift else np.ones(len(masked), dtype=bool)
            read = masked[inside] - shift
            source = np.full(len(masked), before + row)
            source[inside] = number + np.arange(len(read))
            which.append(np.full(len(masked), row))
            slots.append(masked)
            sources.append(source)
        reads.append(row * width + read)
        number += len(read)
    assert number == before
    return Layout(
        sent=sent,
        read=_joined(reads),
        which=_joined(which),
        slot=_joined(slots),
        source=_joined(sources),
        closing=closing,
        audit=_joined(audits),
        last=np.array(lasts, dtype=np.intp),
    )


def _ids(state: RequestState, end_id: int | None) -> NDArray[np.int32]:
    if state.closing is not None:
        return state.closing.delivered
    assert state.block is not None
    return state.block.ids if end_id is None else np.append(state.block.ids, np.int32(end_id))


def _count(state: RequestState, shift: bool) -> int:
    """Rows read of a request."""
    if state.closing is not None:
        return state.closing.live
    assert state.block is not None
    masked = state.block.masked()
    return int((masked > 0).sum()) if shift else len(masked)


def _joined(parts: list[NDArray[np.intp]]) -> NDArray[np.intp]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.intp)
