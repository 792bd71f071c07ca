"""The length head decides, from the state of the last committed token.

p(S_b | committed text) is what training charges for a block's length, so drawing from it samples
the model's own distribution of cuts.
"""

from __future__ import annotations

import numpy as np

from abf.decode.config import LengthHeadExtent
from abf.decode.view import Extent, ExtentView


class LengthHead:
    """Draw a length, or take the likeliest."""

    needs_lengths = True

    def __init__(self, *, sample: bool) -> None:
        self.sample = sample

    def next_extent(self, view: ExtentView) -> Extent:
        """Length by inversion of the cumulative distribution, or its mode."""
        probs = view.length_probs
        assert probs is not None, "the engine gives length_probs to a policy that needs them"
        if not self.sample:
            return Extent(int(probs.argmax()) + view.least)
        cumulative = np.cumsum(probs, dtype=np.float64)
        index = np.searchsorted(cumulative, view.uniform * cumulative[-1], side="right")
        return Extent(min(int(index), len(probs) - 1) + view.least)


def build(cfg: LengthHeadExtent) -> LengthHead:
    """The policy of its config."""
    return LengthHead(sample=cfg.pick == "sample")
