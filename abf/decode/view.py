"""What a plug-in sees and may ask for: views, actions, and the protocols of strategies and extents.

Letters: n slots of the active block that still count, k alternatives a slot. A view is read-only
and belongs to one request; its rows are slots from left to right. Slots are named by uid, not by
index, so that an action stays meaningful when later operations move slots.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    uids: IntArray
    """[n] names of the slots."""
    ids: IntArray
    """[n] token ids; `mask_id` where nothing is committed yet."""
    is_mask: NDArray[np.bool_]
    """[n] slots that may be committed."""
    token: IntArray
    """[n] the sampler's choice; -1 where committed."""
    confidence: FloatArray
    """[n] probability of that choice before temperature; NaN where committed."""
    entropy: FloatArray
    """[n] nats, of the model's distribution; NaN where committed."""
    margin: FloatArray
    """[n] largest minus second largest probability; NaN where committed."""
    top_ids: IntArray
    """[n, k] likeliest tokens; -1 where committed."""
    top_probs: FloatArray
    """[n, k] their probabilities; NaN where committed."""
    commit_step: IntArray
    """[n] step at which a slot was committed; -1 where it was not."""
    commit_confidence: FloatArray
    """[n] confidence it was committed with; NaN where it was not."""


@dataclass(frozen=True)
class Commit:
    """Masks to fill and lock."""

    uids: IntArray
    """[m] masked slots of the view, each once."""
    tokens: IntArray
    """[m] their tokens: any vocabulary id; the document token ends the text there."""


@dataclass(frozen=True)
class Action:
    """What to do with the block; a field an operation, each of which the engine really applies.

    A commit of nothing is turned into the surest single one: every step makes progress.
    """

    commit: Commit
    threshold: float = float("nan")
    """Bar the commits had to pass, for the log; NaN if there was none."""


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
    """The step cap closed it."""
    commit_step: IntArray
    """[kept]"""
    commit_confidence: FloatArray
    """[kept]"""


class Strategy(Protocol):
    """What to commit at a step. State is the strategy's own object, one a request."""

    def start(self, meta: RequestMeta) -> Any:
        """State of a new request."""
        ...

    def decide(self, view: BlockView, state: Any) -> Action:
        """Next action on the active block."""
        ...

    def end_block(self, summary: BlockSummary, state: Any) -> None:
        """The block was closed."""
        ...


@dataclass(frozen=True)
class ExtentView:
    """What an extent policy knows before a block is opened."""

    request: int
    block: int
    tokens_left: int
    """New tokens that may still be delivered; the engine cuts a longer extent to this."""
    length_probs: FloatArray | None
    """[S] probability of 1..S slots given the committed text and that there is one, if the policy
    asked for it."""
    uniform: float
    """A random number in [0, 1) that belongs to this request and block."""


@dataclass(frozen=True)
class Extent:
    """The span to open."""

    length: int
    """Slots, at least 1."""


class ExtentPolicy(Protocol):
    """How long the next block is."""

    needs_lengths: bool
    """Whether the view must carry `length_probs`."""

    def next_extent(self, view: ExtentView) -> Extent:
        """Extent of the next block."""
        ...
