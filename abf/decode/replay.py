"""Fold an event log back into text, checking every step of the way.

Invariants: uids are never reused; only masks are filled and only tokens substituted; a locked slot
never changes unless its block is reopened; the operations of a step stand in their order, one a
slot, and nothing is inserted beside what the step deletes; nothing delivered is a mask or unlocked;
a block is closed once after its last edit and every delivered token's keys are written; and the
hash chain over events *and* folded states agrees with the log.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from abf.decode.events import (
    CLOSING,
    CODE,
    PHASE,
    RECORD,
    TYPES,
    from_arrow,
    link,
    root,
    state_bytes,
)
from abf.decode.trace import read_trace
from abf.errors import ArtifactError


class RuleError(Exception):
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
    behind: int = -1
    """`last_uid` before the block that was closed last."""
    active: bool = False
    """A block is open."""
    due: int = 0
    """Masks that its opening is still to insert."""
    uids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    locked: list[bool] = field(default_factory=list)
    unwritten: list[int] = field(default_factory=list)
    stage: int = 0
    """How far the operations of the step have come: deletions, writes, insertions, locks."""
    place: int = 0
    """Where the step's next operation may be at the earliest; its next insertion: at the latest."""
    banned: set[int] = field(default_factory=set)
    """What stands before the gaps in which the step has deleted."""
    newest: int = -1
    """Mask that the step inserted last."""
    reopening: bool = False
    """The step reopens the block: it puts masks where it deletes."""

    def state(self) -> bytes:
        """The same bytes the engine hashed."""
        closed = len(self.prompt_ids) + len(self.token_ids)
        return state_bytes(closed, self.uids, self.ids, self.locked)

    def apply(self, kind: int, uid: int, left: int, old: int, new: int, length: int) -> None:
        """Fold one event in; raises RuleError with the rule it breaks."""
        if self.ended:
            raise RuleError("follows the request's END")
        if kind in _WRITES:
            slot = self._free(uid, _WRITING)
            held = self.ids[slot]
            if old != held or (held == self.mask_id) != (kind == _FILL):
                raise RuleError(f"writes uid {uid}, which holds {held}, not {old}")
            if not 0 <= new < self.mask_id or new == old:
                raise RuleError(f"writes id {new} over {old}")
            self.ids[slot] = new
        elif kind == _COMMIT:
            slot = self._free(uid, _LOCKING)
            if self.ids[slot] != new or new == self.mask_id:
                raise RuleError(f"commits {new} at uid {uid}, which holds {self.ids[slot]}")
            self.locked[slot] = True
        elif kind == _KV_WRITE:
            if not self.unwritten or self.unwritten.pop(0) != uid:
                raise RuleError(f"writes keys of uid {uid} out of turn")
            if self.token_ids[len(self.token_ids) - len(self.unwritten) - 1] != new:
                raise RuleError(f"writes keys of id {new}, which was not delivered")
        elif kind == _INSERT:
            self._insert(uid, left, new)
        elif kind == _DELETE:
            slot = self._free(uid, _DELETING)
            if old != self.ids[slot]:
                raise RuleError(f"deletes {old} at uid {uid}, which holds {self.ids[slot]}")
            if not self.reopening:
                self.banned.add(self.uids[slot - 1] if slot else self.last_uid)
            del self.uids[slot], self.ids[slot], self.locked[slot]
        elif kind == _OPEN:
            if self.active or self.unwritten or length < 0:
                raise RuleError("opens a block before the one before it was closed and written")
            self.active, self.due = True, length
        elif kind in _CLOSING:
            self._complete(length)
        elif kind == _REOPEN:
            self._reopen(length)
        elif kind == _PROMPT:
            if self.active or self.token_ids:
                raise RuleError("is context after the first block")
            self._fresh(uid, left, self.last_uid)
            self.prompt_ids.append(new)
            self.last_uid = uid
        else:
            if self.active or self.unwritten or length != len(self.token_ids):
                raise RuleError(f"ends after {length} new tokens, but {len(self.token_ids)} stand")
            self.ended = True

    def begin(self) -> None:
        """A group of events begins."""
        self.stage, self.place, self.newest, self.reopening = _DELETING, 0, -1, False
        self.banned.clear()

    def _free(self, uid: int, stage: int) -> int:
        """Place of a slot that may be changed by an operation of this stage of a step."""
        if self.due or uid not in self.uids:
            raise RuleError(f"touches uid {uid}, no slot of the active block")
        slot = self.uids.index(uid)
        if self.locked[slot]:
            raise RuleError(f"touches uid {uid}, which is locked")
        self._advance(stage)
        if slot < self.place:
            raise RuleError(f"touches uid {uid} a second time, or out of order")
        self.place = slot + (stage != _DELETING)
        return slot

    def _advance(self, stage: int) -> None:
        if stage < self.stage:
            raise RuleError("comes after a later operation of its step")
        if stage > self.stage:
            self.stage, self.place = stage, len(self.uids) + 1 if stage == _INSERTING else 0

    def _insert(self, uid: int, left: int, new: int) -> None:
        if not self.active or new != self.mask_id:
            raise RuleError("inserts without an open block, or something else than a mask")
        end = self.uids[-1] if self.uids else self.last_uid
        if self.due:
            self._fresh(uid, left, end)
            self.due -= 1
            at = len(self.uids)
        else:
            self._advance(_INSERTING)
            if left not in (self.last_uid, *self.uids):
                raise RuleError(f"inserts behind uid {left}, no slot of the active block")
            at = 0 if left == self.last_uid else self.uids.index(left) + 1
            between = 0 < at < len(self.uids) and self.locked[at - 1] and self.locked[at]
            if (left != self.newest and at >= self.place) or left in self.banned or between:
                raise RuleError(f"inserts behind uid {left}, where it may not")
            self.place = min(self.place, at)
            self._fresh(uid, left, left)
            self.newest = uid
        self.uids.insert(at, uid)
        self.ids.insert(at, new)
        self.locked.insert(at, False)

    def _fresh(self, uid: int, left: int, before: int) -> None:
        if uid != self.next_uid or left != before:
            raise RuleError(f"adds uid {uid} behind {left}; expected {self.next_uid} and {before}")
        self.next_uid += 1

    def _complete(self, length: int) -> None:
        if not self.active or self.due or not 1 <= length <= len(self.uids):
            raise RuleError(f"delivers {length} of {len(self.uids)} slots")
        if not all(self.locked[:length]):
            raise RuleError("delivers a slot that was not committed")
        self.token_ids += self.ids[:length]
        self.block_lengths.append(length)
        self.unwritten = self.uids[:length]
        self.behind, self.last_uid = self.last_uid, self.uids[length - 1]
        self.active, self.uids, self.ids, self.locked = False, [], [], []

    def _reopen(self, length: int) -> None:
        if self.active or not self.unwritten or len(self.unwritten) != self.block_lengths[-1]:
            raise RuleError("reopens a block that was not just closed")
        if length != self.block_lengths.pop():
            raise RuleError(f"reopens {length} slots of {len(self.unwritten)}")
        self.uids, self.unwritten = self.unwritten, []
        self.ids, self.token_ids = self.token_ids[-length:], self.token_ids[:-length]
        self.locked, self.active, self.last_uid = [False] * length, True, self.behind
        self.reopening = True


_OPEN, _INSERT, _FILL = CODE["OPEN"], CODE["INSERT"], CODE["FILL"]
_COMMIT, _PROMPT = CODE["COMMIT"], CODE["PROMPT"]
_DELETE, _REOPEN, _KV_WRITE = CODE["DELETE"], CODE["REOPEN"], CODE["KV_WRITE"]
_DELETING, _WRITING, _INSERTING, _LOCKING = range(4)
_WRITES = (_FILL, CODE["SUBSTITUTE"])
_CLOSING = tuple(CODE[name] for name in CLOSING)


def replay(path: Path) -> dict[int, list[int]]:
    """Delivered token ids of every request, from the log alone (of an incomplete log: so far).

    Raises:
        ArtifactError: the log is damaged or was altered; names the first bad event.
    """
    metadata, table, _ = read_trace(path)
    folded = fold(table, metadata, where=str(path))
    return {request: state.token_ids for request, state in folded.items()}


def fold(
    table: pa.Table,
    header: Mapping[str, str],
    *,
    where: str,
    look: Callable[[int, Folded], None] | None = None,
) -> dict[int, Folded]:
    """Final state of every request in a table of events.

    Args:
        table: EVENTS rows, each request's in order.
        header: the log's.
        where: name of the log, for errors.
        look: is shown each group's first row and its request's state before it.

    Raises:
        ArtifactError: names the first event that cannot be or whose hash does not fit.
    """
    events = from_arrow(table, where)
    mask_id, begin = int(header["mask_id"]), root(header)
    hashes = table["state_hash"].to_pylist()
    data, size = events.tobytes(), RECORD.itemsize
    names = ("request", "seq", "type", "uid", "left_uid", "old_id", "new_id", "length")
    columns = (events[name].tolist() for name in names)
    starts = group_starts(events).tolist()
    requests: dict[int, Folded] = {}
    chains: dict[int, tuple[int, bytes]] = {}
    rows = zip(starts, hashes, *columns, strict=True)
    for row, (first, logged, request, seq, kind, uid, left, old, new, length) in enumerate(rows):
        state = requests.get(request)
        if state is None:
            state = requests[request] = Folded(mask_id)
        expected, digest = chains.get(request, (0, begin))
        try:
            if seq != expected:
                raise RuleError(f"should be seq {expected}: events are missing or out of order")
            before = state.state() if first else b""
            digest = link(digest, data[row * size : (row + 1) * size], before)
            if digest.hex() != logged:
                raise RuleError(
                    "does not fit the hash chain: it, the state, or the header was altered"
                )
            if first:
                state.begin()
                if look is not None:
                    look(row, state)
            state.apply(kind, uid, left, old, new, length)
        except RuleError as error:
            block, step = int(events["block"][row]), int(events["step"][row])
            raise ArtifactError(
                f"{where}: first bad event is request {request}, seq {seq} ({TYPES[kind]}, block "
                f"{block}, step {step}): it {error}"
            ) from None
        chains[request] = (seq + 1, digest)
    return requests


def group_starts(events: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether an event begins a (block, step, phase) of its request, [m]."""
    order = np.argsort(events["request"], kind="stable")
    key = np.stack(
        [events["request"], events["block"], events["step"], PHASE[events["type"]]], axis=1
    )[order]
    first = np.ones(len(events), dtype=bool)
    first[1:] = (key[1:] != key[:-1]).any(axis=1)
    starts = np.empty_like(first)
    starts[order] = first
    return starts
