"""What a plug-in sees and may ask for: views, actions, and the protocols of strategies and extents.

Letters: n slots of the active block that still count, k alternatives a slot. A view is read-only
and belongs to one request; its rows are slots from left to right. Slots are named by uid, not by
index, so that an action stays meaningful when later operations move slots.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer]
FloatArray = NDArray[np.floating]


@dataclass(frozen=True)
class RequestMeta:
    """What a strategy is told when a request begins."""

    request: int
    """Number of the request in its decode."""
    prompt_tokens: int
    """Tokens of context, the opening document token included."""
    new_tokens: int
    """Tokens that may be generated."""


@dataclass(frozen=True)
class BlockView:
    """The active block of one request after a forward pass."""

    request: int
    block: int
    """Number of the block in its request, from 0."""
    step: int
    """Number of this decision in the block, from 0."""
    steps_left: int
    """Decisions after this one before the engine commits everything."""
    tokens_left: int
    """New tokens that may still be delivered, this block's included."""
    mask_id: int
    document_id: int
    forbidden: IntArray
    """Tokens that may not be written."""
    uids: IntArray
    """[n] names of the slots."""
    ids: IntArray
    """[n] token ids; `mask_id` where nothing is committed yet."""
    is_mask: NDArray[np.bool_]
    """[n] slots that may be committed."""
    token: IntArray
    """[n] the sampler's choice; -1 where nothing was proposed (held tokens, unless edits are
    read)."""
    confidence: FloatArray
    """[n] probability of that choice before temperature; NaN likewise."""
    entropy: FloatArray
    """[n] nats, of the model's distribution; NaN likewise."""
    margin: FloatArray
    """[n] largest minus second largest probability; NaN likewise."""
    top_ids: IntArray
    """[n, k] likeliest tokens; -1 likewise."""
    top_probs: FloatArray
    """[n, k] their probabilities; NaN likewise."""
    commit_step: IntArray
    """[n] step at which a slot was locked; -1 where it was not, or when the block opened."""
    commit_confidence: FloatArray
    """[n] confidence its token was written with; NaN in a mask."""
    edit: EditView | None = None
    """What the edit heads say, for a strategy that needs them."""


@dataclass(frozen=True)
class EditView:
    """Gates and history of the same n slots; gap i lies before slot i, gap n before the end."""

    gap_uids: IntArray
    """[n+1] what names a gap: the uid to its left."""
    keep: FloatArray
    """[n] probability that a token stays, or that a mask is to be filled."""
    revise: FloatArray
    """[n] probability that another token belongs here; 0 at a mask."""
    delete: FloatArray
    """[n] probability that nothing belongs here."""
    missing: FloatArray
    """[n+1] expected tokens missing in each gap."""
    complete: float
    """Probability that the block is whole and right as it is."""
    raw: FloatArray
    """[n+1, E] the numbers behind these, `abf.model.transformer.EDITS`."""
    locked: NDArray[np.bool_]
    """[n] slots that nothing changes any more."""
    changes: IntArray
    """[n] how often a slot's token was substituted."""
    spent: NDArray[np.bool_]
    """[n] slots that were substituted as often as the engine lets them be."""
    stable: IntArray
    """[n] steps since a slot was last written or inserted."""
    room: int
    """Masks that may still be inserted."""
    insertable: NDArray[np.bool_]
    """[n+1] gaps where they may: not behind a locked document token, nor between locked slots."""
    uniforms: FloatArray
    """[n+1, 3] random numbers in [0, 1) of each slot and gap, for a timed strategy; else [0, 3]."""


def sure(
    view: BlockView, masks: NDArray[np.bool_], *, bar: float, window: int | None
) -> NDArray[np.bool_]:
    """[n] masks to fill: those whose token reaches the bar, else the leftmost of the surest.

    Args:
        view: the block.
        masks: [n] which may be filled.
        bar: probability before temperature.
        window: only the first so many of them count; none counts all.
    """
    if window is not None:
        masks = masks & (masks.cumsum() <= window)
    confidence = np.where(masks, view.confidence, -1.0)
    chosen = masks & (confidence >= bar)
    if masks.any() and not chosen.any():
        chosen[confidence.argmax()] = True
    return chosen


def pooled(values: FloatArray, is_mask: NDArray[np.bool_]) -> FloatArray:
    """[n+1] sum over each gap's group: a mask inserted in any gap between the same two visible
    tokens gives the same text."""
    group = np.concatenate([[0], np.cumsum(~is_mask)])
    return np.bincount(group, values).astype(np.float64)[group]


_NONE = np.zeros(0, dtype=np.int32)


@dataclass(frozen=True)
class Tokens:
    """Slots and what they are to hold."""

    uids: IntArray = field(default_factory=_NONE.copy)
    """[m] slots of the view, each once."""
    tokens: IntArray = field(default_factory=_NONE.copy)
    """[m] any vocabulary id; the document token ends the text there."""


@dataclass(frozen=True)
class Gaps:
    """Gaps and how many masks they are to get."""

    uids: IntArray = field(default_factory=_NONE.copy)
    """[g] uids to the left of the gaps (`EditView.gap_uids`), each once."""
    counts: IntArray = field(default_factory=_NONE.copy)
    """[g] at least 1 each."""


@dataclass(frozen=True)
class Action:
    """What to do with the block; a field an operation, each of which the engine really applies, as
    far as its rules let it (`abf.decode.decide`)."""

    commit: Tokens = Tokens()
    """Masks to fill and lock."""
    fill: Tokens = Tokens()
    """Masks to fill."""
    substitute: Tokens = Tokens()
    """Tokens to exchange for others."""
    delete: IntArray = field(default_factory=_NONE.copy)
    """[m] uids of slots to take out."""
    insert: Gaps = Gaps()
    """Masks to put in."""
    lock: IntArray = field(default_factory=_NONE.copy)
    """[m] uids of tokens that are to stay."""
    complete: bool | None = None
    """Close the block (masks that are left are filled, and it counts as forced), or do not; None
    closes it once no mask is left."""
    bars: Mapping[str, float] = field(default_factory=dict)
    """By event type, the bar that such an operation had to pass, for the log."""


@dataclass(frozen=True)
class BlockSummary:
    """A closed block."""

    block: int
    opened: int
    """Slots it was opened with."""
    kept: int
    """Slots delivered."""
    steps: int
    forced: bool
    """It was closed before the strategy was done with it."""
    commit_step: IntArray
    """[kept]"""
    commit_confidence: FloatArray
    """[kept]"""


class Strategy(Protocol):
    """What to do at a step. State is the strategy's own object, one a request."""

    needs_edits: bool
    """Whether the view must carry `edit`, and proposals at tokens too."""
    timed: bool
    """Whether it keeps a clock of its own: a step may then do nothing, a block may open empty, and
    neither the cap on changes nor the watch for repeated texts applies."""

    def start(self, meta: RequestMeta) -> Any:
        """State of a new request."""
        ...

    def decide(self, view: BlockView, state: Any) -> Action:
        """Next action on the active block."""
        ...

    def end_block(self, summary: BlockSummary, state: Any) -> None:
        """The block was closed (a second time, if it was reopened)."""
        ...


@dataclass(frozen=True)
class ExtentView:
    """What an extent policy knows before a block is opened."""

    request: int
    block: int
    tokens_left: int
    """New tokens that may still be delivered; the engine cuts a longer extent to this."""
    length_probs: FloatArray | None
    """Probability of `least`..S slots given the committed text, if the policy asked for it."""
    uniform: float
    """A random number in [0, 1) that belongs to this request and block."""
    least: int = 1
    """Fewest slots that may be opened."""
    earlier: IntArray | None = None
    """Tokens of the finished block that the policy asked for."""


@dataclass(frozen=True)
class Extent:
    """The span to open."""

    length: int
    """Slots, at least `least`."""
    tokens: IntArray | None = None
    """[length] what they hold at first; none: masks."""


class ExtentPolicy(Protocol):
    """How long the next block is."""

    needs_lengths: bool
    """Whether the view must carry `length_probs`."""
    back: int
    """Which finished block the view must carry: so many before the one to open; 0 for none."""

    def next_extent(self, view: ExtentView) -> Extent:
        """Extent of the next block."""
        ...
