"""Fold an event log back into text, checking every step of the way.

Invariants: uids are never reused, only masks are filled, only filled slots are committed, nothing
delivered is a mask, a block is closed once and every delivered token's keys are written, and the
hash chain over events *and* folded states agrees with the log.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from abf.decode.events import CODE, PHASE, RECORD, TYPES, from_arrow, link, state_bytes
from abf.decode.trace import read_trace
from abf.errors import ArtifactError


class _EventError(Exception):
    """An event that cannot follow the ones before it."""


@dataclass
class Folded:
    """State of one request, folded from its events."""

    mask_id: int
    prompt_ids: list[int] = field(default_factory=list)
    """Context, the opening document token included."""
    token_ids: list[int] = field(default_factory=list)
    """Delivered tokens."""
    block_lengths: list[int] = field(default_factory=list)
    """Delivered tokens of each closed block."""
    ended: bool = False
    next_uid: int = 0
    last_uid: int = -1
    opened: int = 0
    uids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    committed: list[bool] = field(default_factory=list)
    unwritten: list[int] = field(default_factory=list)

    def state(self) -> bytes:
        """The same bytes the engine hashed."""
        closed = len(self.prompt_ids) + len(self.token_ids)
        return state_bytes(closed, self.uids, self.ids, self.committed)

    def apply(self, kind: int, uid: int, left: int, old: int, new: int, length: int) -> None:
        """Fold one event in; raises _EventError with the rule it breaks."""
        if self.ended:
            raise _EventError("follows the request's END")
        if kind == _FILL:
            slot = self._slot(uid)
            if old != self.mask_id or self.ids[slot] != old:
                raise _EventError(f"fills uid {uid}, which holds {self.ids[slot]}, not a mask")
            if not 0 <= new < self.mask_id:
                raise _EventError(f"fills with id {new}, outside the vocabulary")
            self.ids[slot] = new
        elif kind == _COMMIT:
            slot = self._slot(uid)
            if self.ids[slot] != new or new == self.mask_id or self.committed[slot]:
                raise _EventError(f"commits {new} at uid {uid}, which holds {self.ids[slot]}")
            self.committed[slot] = True
        elif kind == _KV_WRITE:
            if not self.unwritten or self.unwritten.pop(0) != uid:
                raise _EventError(f"writes keys of uid {uid} out of turn")
            if self.token_ids[len(self.token_ids) - len(self.unwritten) - 1] != new:
                raise _EventError(f"writes keys of id {new}, which was not delivered")
        elif kind == _INSERT:
            if len(self.uids) >= self.opened or new != self.mask_id:
                raise _EventError("inserts beyond the opened extent, or something else than a mask")
            self._fresh(uid, left, self.uids[-1] if self.uids else self.last_uid)
            self.uids.append(uid)
            self.ids.append(new)
            self.committed.append(False)
        elif kind == _OPEN:
            if self.uids or self.unwritten or length < 1:
                raise _EventError("opens a block before the one before it was closed and written")
            self.opened = length
        elif kind in (_COMPLETE, _FORCED_COMPLETE):
            self._complete(length)
        elif kind == _PROMPT:
            if self.opened:
                raise _EventError("is context after the first block")
            self._fresh(uid, left, self.last_uid)
            self.prompt_ids.append(new)
            self.last_uid = uid
        else:
            if self.uids or self.unwritten or length != len(self.token_ids):
                raise _EventError(
                    f"ends after {length} new tokens, but {len(self.token_ids)} stand"
                )
            self.ended = True

    def _slot(self, uid: int) -> int:
        if len(self.uids) != self.opened or uid not in self.uids:
            raise _EventError(f"touches uid {uid}, no slot of the active block")
        return self.uids.index(uid)

    def _fresh(self, uid: int, left: int, before: int) -> None:
        if uid != self.next_uid or left != before:
            raise _EventError(
                f"adds uid {uid} behind {left}; expected {self.next_uid} and {before}"
            )
        self.next_uid += 1

    def _complete(self, length: int) -> None:
        if not self.uids or not 1 <= length <= len(self.uids):
            raise _EventError(f"delivers {length} of {len(self.uids)} slots")
        if not all(self.committed[:length]):
            raise _EventError("delivers a slot that was not committed")
        self.token_ids += self.ids[:length]
        self.block_lengths.append(length)
        self.unwritten = self.uids[:length]
        self.last_uid = self.uids[length - 1]
        self.uids, self.ids, self.committed = [], [], []


_OPEN, _INSERT, _FILL = CODE["OPEN"], CODE["INSERT"], CODE["FILL"]
_COMMIT, _PROMPT = CODE["COMMIT"], CODE["PROMPT"]
_COMPLETE, _FORCED_COMPLETE = CODE["COMPLETE"], CODE["FORCED_COMPLETE"]
_KV_WRITE = CODE["KV_WRITE"]


def replay(path: Path) -> dict[int, list[int]]:
    """Delivered token ids of every request, from the log alone (of an incomplete log: so far).

    Raises:
        ArtifactError: the log is damaged or was altered; names the first bad event.
    """
    metadata, table, _ = read_trace(path)
    folded = fold(table, mask_id=int(metadata["mask_id"]), where=str(path))
    return {request: state.token_ids for request, state in folded.items()}


def fold(table: pa.Table, *, mask_id: int, where: str) -> dict[int, Folded]:
    """Final state of every request in a table of events.

    Args:
        table: EVENTS rows, each request's in order.
        mask_id: id of MASK.
        where: name of the log, for errors.

    Raises:
        ArtifactError: names the first event that cannot be or whose hash does not fit.
    """
    events = from_arrow(table, where)
    hashes = table["state_hash"].to_pylist()
    data, size = events.tobytes(), RECORD.itemsize
    names = ("request", "seq", "type", "uid", "left_uid", "old_id", "new_id", "length")
    columns = (events[name].tolist() for name in names)
    starts = _group_starts(events)
    requests: dict[int, Folded] = {}
    chains: dict[int, tuple[int, bytes]] = {}
    rows = zip(starts, hashes, *columns, strict=True)
    for row, (first, logged, request, seq, kind, uid, left, old, new, length) in enumerate(rows):
        state = requests.get(request)
        if state is None:
            state = requests[request] = Folded(mask_id)
        expected, digest = chains.get(request, (0, b""))
        try:
            if seq != expected:
                raise _EventError(f"should be seq {expected}: events are missing or out of order")
            before = state.state() if first else b""
            digest = link(digest, data[row * size : (row + 1) * size], before)
            if digest.hex() != logged:
                raise _EventError("does not fit the hash chain: it, or the state, was altered")
            state.apply(kind, uid, left, old, new, length)
        except _EventError as error:
            block, step = int(events["block"][row]), int(events["step"][row])
            raise ArtifactError(
                f"{where}: first bad event is request {request}, seq {seq} ({TYPES[kind]}, block "
                f"{block}, step {step}): it {error}"
            ) from None
        chains[request] = (seq + 1, digest)
    return requests


def _group_starts(events: NDArray[Any]) -> list[bool]:
    """Whether an event begins a (block, step, phase) of its request, [m]."""
    order = np.argsort(events["request"], kind="stable")
    key = np.stack(
        [events["request"], events["block"], events["step"], PHASE[events["type"]]], axis=1
    )[order]
    first = np.ones(len(events), dtype=bool)
    first[1:] = (key[1:] != key[:-1]).any(axis=1)
    starts = np.empty_like(first)
    starts[order] = first
    return starts.tolist()
