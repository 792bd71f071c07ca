"""The length head decides, from the state of the last committed token.

p(S_b | committed text) is what training charges for a block's length, so drawing from it samples
the model's own distribution of cuts. On a path with late tokens it is the law of the masks at the
start, Binomial(n, 1 - p_D) for a block of n; a decoder that fills them all wants the law of n.

Letters: S lengths.
"""

from __future__ import annotations

import functools

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from abf.decode.config import LengthHeadExtent
from abf.decode.view import Extent, ExtentView

_SWEEPS = 100
"""Of expectation maximisation; the likeliest length is settled after a few."""


class LengthHead:
    """Draw a length, or take the likeliest."""

    needs_lengths = True
    back = 0

    def __init__(self, *, sample: bool, late: float) -> None:
        self.sample, self.late = sample, late

    def next_extent(self, view: ExtentView) -> Extent:
        """Length by inversion of the cumulative distribution, or its mode."""
        probs = view.length_probs
        assert probs is not None, "the engine gives length_probs to a policy that needs them"
        if self.late:
            probs = finished(probs, least=view.least, late=self.late)
        if not self.sample:
            return Extent(int(probs.argmax()) + view.least)
        cumulative = np.cumsum(probs, dtype=np.float64)
        index = np.searchsorted(cumulative, view.uniform * cumulative[-1], side="right")
        return Extent(min(int(index), len(probs) - 1) + view.least)


def finished(started: NDArray[np.floating], *, least: int, late: float) -> NDArray[np.float64]:
    """Law of finished lengths that best explains (in KL) the law of the masks at the start.

    Args:
        started: [S] law of `least`.. masks, given that there are that many.
        least: fewest masks, and tokens.
        late: share of tokens that are no mask at the start.
    """
    thinned, seen = _thinning(len(started), least, late)
    law = np.full(len(started), 1 / len(started))
    for _ in range(_SWEEPS):
        law = law * (thinned.T @ (started / np.maximum(thinned @ law, 1e-300)))
        law /= law.sum()
    law = law / seen
    return law / law.sum()


@functools.cache
def _thinning(S: int, least: int, late: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """[S, S] P(masks | tokens, at least `least` masks), and [S] how likely so many are."""
    lengths = least + np.arange(S)
    thinned = stats.binom.pmf(lengths[:, None], lengths, 1 - late)
    seen = thinned.sum(axis=0)
    return thinned / seen, seen


def build(cfg: LengthHeadExtent) -> LengthHead:
    """The policy of its config; a run has settled `late` (`abf.config`), alone it is 0."""
    return LengthHead(sample=cfg.pick == "sample", late=cfg.late or 0.0)
