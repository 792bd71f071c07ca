"""A block that is open, and one step's operations on it, with the events that tell them.

Letters: n slots before the step, d deleted, w written, g gaps. Slots and gaps are numbered as
before the step; gap i lies before slot i.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abf.decode.events import CODE, blank

SLOT = np.dtype(
    [
        ("uid", "<i4"),
        ("id", "<i4"),
        ("locked", "?"),
        ("commit_step", "<i4"),  # step at which it was locked, or -1
        ("confidence", "<f4"),  # probability its token was written with, or NaN
        ("changes", "<i4"),  # substitutions
        ("changed", "<i4"),  # step at which it was last inserted or written
    ]
)
"""What is known of a slot of an open block."""


def masks(uids: NDArray[np.integer], mask_id: int, *, step: int) -> NDArray[Any]:
    """[n] new SLOTs."""
    slots = np.zeros(len(uids), dtype=SLOT)
    slots["uid"], slots["id"] = uids, mask_id
    slots["commit_step"], slots["confidence"], slots["changed"] = -1, np.nan, step
    return slots


@dataclass
class ActiveBlock:
    """Slots being denoised."""

    number: int
    slots: NDArray[Any]
    """[n] SLOTs."""
    live: int
    """Slots that still count: up to the first locked document token."""
    mask_id: int
    step: int = 0
    opened: int = 0
    """Slots it was opened with."""
    forced: bool = False
    stalled: bool = False
    reopened: bool = False
    seen: dict[bytes, int] = field(default_factory=dict)
    """Texts it has been, and the first step that left each."""
    oscillates: bool = False
    """It came back to one of them: nothing is inserted any more."""

    @property
    def uids(self) -> NDArray[np.int32]:
        """[n]"""
        return self.slots["uid"]

    @property
    def ids(self) -> NDArray[np.int32]:
        """[n]"""
        return self.slots["id"]

    @property
    def locked(self) -> NDArray[np.bool_]:
        """[n] slots that nothing changes any more."""
        return self.slots["locked"]

    @property
    def delivered(self) -> NDArray[np.int32]:
        """Ids of the live slots, [live]."""
        return self.ids[: self.live]

    def masked(self) -> NDArray[np.intp]:
        """Slots still to be filled."""
        return np.flatnonzero(self.ids[: self.live] == self.mask_id)


_NONE = np.zeros(0, dtype=np.intp)


@dataclass
class Edits:
    """Operations that follow the rules, and what the model said of them."""

    delete: NDArray[np.intp] = field(default_factory=_NONE.copy)
    """[d] slots, ascending."""
    write: NDArray[np.intp] = field(default_factory=_NONE.copy)
    """[w] slots that are filled or substituted, ascending."""
    tokens: NDArray[np.integer] = field(default_factory=_NONE.copy)
    """[w]"""
    gaps: NDArray[np.intp] = field(default_factory=_NONE.copy)
    """[g] gaps that get masks, ascending; neither neighbour is deleted."""
    counts: NDArray[np.intp] = field(default_factory=_NONE.copy)
    """[g] how many."""
    lock: NDArray[np.intp] = field(default_factory=_NONE.copy)
    """Slots, ascending; none of them deleted or a mask afterwards."""
    prob: NDArray[np.floating] | float = np.nan
    """[w] probability of each token before temperature."""
    entropy: NDArray[np.floating] | float = np.nan
    """[w] nats."""
    alt_ids: NDArray[np.integer] = field(default_factory=lambda: np.zeros((1, 0), np.int32))
    """[w, k] likeliest tokens."""
    alt_probs: NDArray[np.floating] = field(default_factory=lambda: np.zeros((1, 0), np.float32))
    """[w, k]"""
    delete_gate: NDArray[np.floating] | float = np.nan
    """[d] probability that nothing belongs there."""
    write_gate: NDArray[np.floating] | float = np.nan
    """[w] that a mask is to be filled, that another token belongs there."""
    insert_gate: NDArray[np.floating] | float = np.nan
    """[g] tokens missing."""
    bars: Mapping[str, float] = field(default_factory=dict)
    """By event type, what had to be reached."""

    @property
    def size(self) -> int:
        """Operations that change the text."""
        return len(self.delete) + len(self.write) + len(self.gaps)

    def ids(self, ids: NDArray[np.integer], mask_id: int) -> NDArray[np.integer]:
        """Ids [n] as they will be."""
        new = ids.copy()
        new[self.write] = self.tokens
        return self._rebuilt(new, np.full(self.counts.sum(), mask_id, dtype=np.int32))

    def slots(self, slots: NDArray[Any], mask_id: int, *, first_uid: int, step: int) -> Any:
        """SLOTs [n] as they will be; new uids are given from right to left."""
        new = slots.copy()
        new["changes"][self.write] += slots["id"][self.write] != mask_id
        new["id"][self.write], new["confidence"][self.write] = self.tokens, self.prob
        new["changed"][self.write] = step
        new["locked"][self.lock], new["commit_step"][self.lock] = True, step
        if not len(self.delete) and not len(self.gaps):
            return new
        return self._rebuilt(new, masks(self._uids(first_uid), mask_id, step=step))

    def events(
        self, slots: NDArray[Any], mask_id: int, *, left_uid: int, first_uid: int
    ) -> NDArray[Any]:
        """The step's group of events, in canonical order.

        Args:
            slots: SLOTs [n] before the step.
            mask_id: id of MASK.
            left_uid: what lies before the first slot.
            first_uid: of the inserted masks.
        """
        uids, ids = slots["uid"], slots["id"]
        inserted = int(self.counts.sum()) if len(self.gaps) else 0
        counts = (len(self.delete), len(self.write), inserted, len(self.lock))
        # One allocation, and nothing for what is not done: every step of every request is here.
        events = blank(sum(counts), "COMMIT")
        d, w, i = counts[0], counts[0] + counts[1], counts[0] + counts[1] + counts[2]
        if self.lock.size:
            part = events[i:]
            part["uid"], part["new_id"] = uids[self.lock], ids[self.lock]
            part["prob"] = slots["confidence"][self.lock]
        if self.write.size:
            self._tell_writes(events[d:w], uids, ids, mask_id)
            if np.array_equal(self.write, self.lock):  # nearly every step of mask strategies
                events["new_id"][i:], events["prob"][i:] = self.tokens, self.prob
            elif self.lock.size:
                written = np.searchsorted(self.write, self.lock).clip(max=len(self.write) - 1)
                now = self.write[written] == self.lock
                part = events[i:]
                part["new_id"][now] = self.tokens[written[now]]
                part["prob"][now] = events["prob"][d:w][written[now]]
        if self.delete.size:
            part = events[:d]
            part["type"], part["threshold"] = CODE["DELETE"], self._bar("DELETE")
            part["uid"], part["old_id"] = uids[self.delete], ids[self.delete]
            part["gate"] = self.delete_gate
        if inserted:
            self._tell_insertions(events[w:i], np.concatenate([[left_uid], uids]), first_uid)
            events["new_id"][w:i] = mask_id
        return events

    def _tell_writes(
        self, events: NDArray[Any], uids: NDArray[Any], ids: NDArray[Any], mask_id: int
    ) -> None:
        k, old = self.alt_ids.shape[1], ids[self.write]
        events["type"], events["threshold"] = CODE["FILL"], self._bar("FILL")
        events["uid"], events["old_id"], events["new_id"] = uids[self.write], old, self.tokens
        events["prob"], events["entropy"] = self.prob, self.entropy
        events["gate"] = self.write_gate
        events["alt_ids"][:, :k], events["alt_probs"][:, :k] = self.alt_ids, self.alt_probs
        change = old != mask_id
        if change.any():
            events["type"][change] = CODE["SUBSTITUTE"]
            events["threshold"][change] = self._bar("SUBSTITUTE")

    def _tell_insertions(self, events: NDArray[Any], before: NDArray[Any], first: int) -> None:
        new = self._uids(first)
        left = new - 1
        left[np.cumsum(self.counts) - self.counts] = before[self.gaps]
        gate = np.broadcast_to(self.insert_gate, len(self.gaps)).repeat(self.counts)
        order = new.argsort()
        events["type"], events["threshold"] = CODE["INSERT"], self._bar("INSERT")
        events["uid"], events["left_uid"], events["gate"] = new[order], left[order], gate[order]

    def _bar(self, kind: str) -> float:
        return self.bars.get(kind, np.nan)

    def _uids(self, first: int) -> NDArray[np.int32]:
        """Of the inserted masks, from left to right."""
        # The rightmost gap's masks are inserted first, but each gap's own from left to right.
        after = np.cumsum(self.counts[::-1])[::-1] - self.counts
        starts = np.cumsum(self.counts) - self.counts
        within = np.arange(self.counts.sum()) - starts.repeat(self.counts)
        return (first + after.repeat(self.counts) + within).astype(np.int32)

    def _rebuilt(self, slots: NDArray[Any], fresh: NDArray[Any]) -> NDArray[Any]:
        """Slots without the deleted ones, with the fresh ones in their gaps."""
        keep = np.ones(len(slots), dtype=bool)
        keep[self.delete] = False
        place = np.concatenate([[0], np.cumsum(keep)])[self.gaps]
        return np.insert(slots[keep], place.repeat(self.counts), fresh)
