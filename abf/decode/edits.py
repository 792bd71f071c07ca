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
        uids, ids = slots["uid"], slots["id"].copy()
        groups = []
        if len(self.delete):
            groups.append(blank(len(self.delete), "DELETE", threshold=self._bar("DELETE")))
            groups[-1]["uid"], groups[-1]["old_id"] = uids[self.delete], ids[self.delete]
            groups[-1]["gate"] = self.delete_gate
        if len(self.write):
            groups.append(self._writes(uids, ids, mask_id))
        if inserted := int(self.counts.sum()):
            groups.append(blank(inserted, "INSERT", new_id=mask_id, threshold=self._bar("INSERT")))
            new = self._uids(first_uid)
            before = np.concatenate([[left_uid], uids])[self.gaps]
            starts = np.cumsum(self.counts) - self.counts
            left = new - 1
            left[starts] = before
            gate = np.broadcast_to(self.insert_gate, len(self.gaps)).repeat(self.counts)
            order = new.argsort()
            groups[-1]["uid"], groups[-1]["left_uid"] = new[order], left[order]
            groups[-1]["gate"] = gate[order]
        if len(self.lock):
            ids[self.write] = self.tokens
            prob = slots["confidence"].copy()
            prob[self.write] = self.prob
            groups.append(blank(len(self.lock), "COMMIT", uid=uids[self.lock]))
            groups[-1]["new_id"], groups[-1]["prob"] = ids[self.lock], prob[self.lock]
        return np.concatenate(groups) if groups else blank(0, "FILL")

    def _writes(self, uids: NDArray[Any], ids: NDArray[Any], mask_id: int) -> NDArray[Any]:
        k, old = self.alt_ids.shape[1], ids[self.write]
        events = blank(len(self.write), "FILL", uid=uids[self.write], old_id=old)
        events["new_id"], events["prob"], events["entropy"] = self.tokens, self.prob, self.entropy
        events["gate"], events["threshold"] = self.write_gate, self._bar("FILL")
        events["alt_ids"][:, :k], events["alt_probs"][:, :k] = self.alt_ids, self.alt_probs
        change = old != mask_id
        if change.any():
            events["type"][change] = CODE["SUBSTITUTE"]
            events["threshold"][change] = self._bar("SUBSTITUTE")
        return events

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
