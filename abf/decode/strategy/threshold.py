"""Commit every mask whose confidence reaches a threshold, else the surest one.

Source: Fast-dLLM, arXiv 2505.22618, section 3.3 (tau = 0.9 there).
"""

from __future__ import annotations

from abf.decode.config import ThresholdStrategy
from abf.decode.view import Action, BlockSummary, BlockView, RequestMeta, Tokens, sure


class Threshold:
    """Stateless."""

    needs_edits = timed = False

    def __init__(self, threshold: float, window: int | None = None) -> None:
        self.threshold, self.window = threshold, window

    def start(self, meta: RequestMeta) -> None:
        """No state."""

    def decide(self, view: BlockView, state: None) -> Action:
        """Commit masks with confidence >= threshold; with none, the leftmost surest one."""
        chosen = sure(view, view.is_mask, bar=self.threshold, window=self.window)
        commit = Tokens(view.uids[chosen], view.token[chosen])
        return Action(commit=commit, bars={"FILL": self.threshold})

    def end_block(self, summary: BlockSummary, state: None) -> None:
        """Nothing to forget."""


def build(cfg: ThresholdStrategy) -> Threshold:
    """The strategy of its config."""
    return Threshold(cfg.threshold, cfg.window)
