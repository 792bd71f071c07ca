"""Requests side by side in one forward pass: rows sent, rows read, and who sees whom.

Letters: B requests, M rows of the longest, R rows read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abf.decode.reading import Head, Said, at
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

    def seen(self, rows: int) -> Tensor:
        """[B, rows]: of each request, as its causal or its whole-block rows see."""
        return torch.where(self._causal[:, None], self._ordered.seen(rows), super().seen(rows))


@dataclass
class Batch:
    """Requests and what the engine keeps of them; row b of every tensor is requests[b]'s."""

    requests: list[RequestState]
    cache: KVCache
    head: Head
    last: Said
    """Of each, what the head says at the last committed token."""

    def keep(self, rows: Sequence[int]) -> None:
        """Only these requests stay, in this order."""
        index = torch.tensor(rows, dtype=torch.int64, device=self.last[0].device)
        self.requests = [self.requests[row] for row in rows]
        self.cache.select(index)
        self.last = at(self.last, index)


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
    open: list[int]
    """Requests with an open block."""
    slots: list[NDArray[np.intp]]
    """Slots of each that are to be predicted, ascending."""
    source: NDArray[np.intp]
    """[slots of all] number of the row that predicts each."""
    own: list[NDArray[np.intp]]
    """Numbers of each open block's own rows, its end's last; empty unless edits are read."""
    closing: list[int]
    """Requests whose closed block is written."""
    audit: NDArray[np.intp]
    """[delivered tokens] number of the row that predicts each as an AR model."""
    last: NDArray[np.intp]
    """[closing] number of each closing request's last row."""


def layout(
    requests: Sequence[RequestState], *, shift: bool, end_id: int | None = None, edits: bool = False
) -> Layout:
    """Rows of the next forward pass; an open block ends with `end_id` where the model knows one.

    A masked slot is read from its own row or, with `shift`, from the row before it; a block's first
    slot then from the last committed token (`abf.diffusion.layout.two_stream` in training). With
    `edits` every live slot is predicted, and read at its own row as well, as is the block's end.
    """
    reads, slots, sources, owns, open_, closing, audits, lasts = ([] for _ in range(8))
    sent = [_ids(state, end_id) for state in requests]
    number, width = 0, max(len(ids) for ids in sent)
    wanted = [_wanted(state, edits) for state in requests]
    before = sum(
        _count(state, want, shift, edits) for state, want in zip(requests, wanted, strict=True)
    )
    for row, (state, ids, want) in enumerate(zip(requests, sent, wanted, strict=True)):
        if state.closing is not None:
            read = np.arange(len(ids))
            closing.append(row)
            audits.append(np.concatenate([[before + row], number + read[:-1]]))
            lasts.append(number + len(ids) - 1)
        else:
            inside = want > 0 if shift else np.ones(len(want), dtype=bool)
            source = np.full(len(want), before + row)
            if edits:
                read = np.append(want, len(ids) - 1)
                source[inside] = number + want[inside] - shift
                owns.append(number + np.arange(len(read)))
            else:
                read = want[inside] - shift
                source[inside] = number + np.arange(len(read))
                owns.append(np.zeros(0, dtype=np.intp))
            open_.append(row)
            slots.append(want)
            sources.append(source)
        reads.append(row * width + read)
        number += len(read)
    assert number == before
    return Layout(
        sent=sent,
        read=_joined(reads),
        open=open_,
        slots=slots,
        source=_joined(sources),
        own=owns,
        closing=closing,
        audit=_joined(audits),
        last=np.array(lasts, dtype=np.intp),
    )


def _ids(state: RequestState, end_id: int | None) -> NDArray[np.int32]:
    if state.closing is not None:
        return state.closing.delivered
    assert state.block is not None
    return state.block.ids if end_id is None else np.append(state.block.ids, np.int32(end_id))


def _wanted(state: RequestState, edits: bool) -> NDArray[np.intp]:
    """Slots of a request that are to be predicted."""
    if state.block is None:
        return np.zeros(0, dtype=np.intp)
    return np.arange(state.block.live) if edits else state.block.masked()


def _count(state: RequestState, wanted: NDArray[np.intp], shift: bool, edits: bool) -> int:
    """Rows read of a request."""
    if state.closing is not None:
        return state.closing.live
    if edits:
        return len(wanted) + 1
    return int((wanted > 0).sum()) if shift else len(wanted)


def _joined(parts: list[NDArray[np.intp]]) -> NDArray[np.intp]:
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.intp)
