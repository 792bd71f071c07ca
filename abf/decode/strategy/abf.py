"""Edit a block until it is whole: fill, insert, substitute, delete; lock; complete.

Every decision is a bar that a probability (or a number of missing tokens) has to reach; what may
happen at once, and how often, is the engine's business (`abf.decode.decide`). Source:
docs/method.md; thresholds for filling and editing as in LLaDA2.1, arXiv 2602.08676.

Letters: n slots of the block.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from abf.decode.config import AbfStrategy
from abf.decode.view import (
    Action,
    BlockSummary,
    BlockView,
    EditView,
    Gaps,
    RequestMeta,
    Tokens,
    sure,
)
from abf.diffusion.policy.need import one_block


class Abf:
    """Stateless."""

    timed = False

    def __init__(self, cfg: AbfStrategy) -> None:
        self.cfg = cfg
        self.needs_edits = cfg.needs_edits
        self.bars = {
            "FILL": cfg.fill,
            "SUBSTITUTE": cfg.substitute,
            "DELETE": cfg.delete,
            "INSERT": cfg.insert,
            "COMPLETE": cfg.complete,
        }

    def start(self, meta: RequestMeta) -> None:
        """No state."""

    def decide(self, view: BlockView, state: None) -> Action:
        """Every operation whose bar is reached; complete where none is and the model agrees."""
        edit = view.edit
        none = np.zeros(len(view.ids), dtype=bool)
        delete = none if edit is None else self._delete(view, edit)
        fill = sure(view, view.is_mask & ~delete, bar=self.cfg.fill, window=self.cfg.window)
        filled = Tokens(view.uids[fill], view.token[fill])
        if edit is None or set(self.cfg.operations) == {"fill"}:
            # What nothing can change again is locked at once.
            return Action(commit=filled, complete=self._completes(view), bars=self.bars)
        substitute, tokens = self._substitute(view, edit)
        substitute &= ~delete
        insert = self._insert(view, edit)
        lock = none
        if self.cfg.lock_after is not None:
            calm = ~view.is_mask & ~edit.locked & ~substitute & ~delete
            lock = calm & (edit.stable >= self.cfg.lock_after)
        pending = fill.any() or substitute.any() or delete.any() or len(insert.uids) > 0
        return Action(
            fill=filled,
            substitute=Tokens(view.uids[substitute], tokens[substitute]),
            delete=view.uids[delete],
            insert=insert,
            lock=view.uids[lock],
            complete=not pending and edit.complete >= self.cfg.complete,
            bars=self.bars,
        )

    def end_block(self, summary: BlockSummary, state: None) -> None:
        """Nothing to forget."""

    def _completes(self, view: BlockView) -> bool | None:
        if view.edit is None:
            return None
        return not view.is_mask.any() and view.edit.complete >= self.cfg.complete

    def _delete(self, view: BlockView, edit: EditView) -> NDArray[np.bool_]:
        """Slots to take out, [n]."""
        if "delete" not in self.cfg.operations:
            return np.zeros(len(view.ids), dtype=bool)
        places = one_block(edit.missing, edit.delete, view.is_mask)
        return places.deletions(bar=self.cfg.delete, locked=np.append(edit.locked, False))[:-1]

    def _substitute(
        self, view: BlockView, edit: EditView
    ) -> tuple[NDArray[np.bool_], NDArray[np.integer]]:
        """Slots to write anew, and the likeliest token of each that it does not hold, [n]."""
        other = (view.top_ids != view.ids[:, None]) & ~np.isin(view.top_ids, view.forbidden)
        row, best = np.arange(len(view.ids)), other.argmax(axis=1)
        tokens, probs = view.top_ids[row, best], view.top_probs[row, best]
        free = ~view.is_mask & ~edit.locked & ~edit.spent & other.any(axis=1)
        if "substitute" not in self.cfg.operations:
            free = np.zeros_like(free)
        return free & (edit.revise * probs >= self.cfg.substitute), tokens

    def _insert(self, view: BlockView, edit: EditView) -> Gaps:
        """Masks where tokens are missing."""
        if "insert" not in self.cfg.operations or not edit.room:
            return Gaps()
        counts = one_block(edit.missing, edit.delete, view.is_mask).insertions(
            bar=self.cfg.insert, most=self.cfg.max_insert, open_=edit.insertable
        )
        gaps = np.flatnonzero(counts)
        return Gaps(edit.gap_uids[gaps], counts[gaps])


def build(cfg: AbfStrategy) -> Abf:
    """The strategy of its config."""
    return Abf(cfg)
