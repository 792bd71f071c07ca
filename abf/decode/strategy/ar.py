"""Token by token: commit the leftmost mask.

The engine opens one slot at a time for it and reads that slot from the state of the last committed
token, so each token costs one forward pass.
"""

from __future__ import annotations

import numpy as np

from abf.decode.config import ArStrategy
from abf.decode.view import Action, BlockSummary, BlockView, RequestMeta, Tokens


class Ar:
    """Stateless."""

    needs_edits = timed = False

    def start(self, meta: RequestMeta) -> None:
        """No state."""

    def decide(self, view: BlockView, state: None) -> Action:
        """Commit the sampler's choice at the leftmost mask."""
        first = np.flatnonzero(view.is_mask)[:1]
        return Action(commit=Tokens(view.uids[first], view.token[first]))

    def end_block(self, summary: BlockSummary, state: None) -> None:
        """Nothing to forget."""


def build(cfg: ArStrategy) -> Ar:
    """The strategy of its config."""
    return Ar()
