"""Between engine and strategy: build the view of a block, hold an action to the rules, apply it.

Rules kept here: only masks of the view are filled, with vocabulary ids; every step commits at least
one slot; at the step cap everything left is committed and the block counts as forced. Slots behind
a committed document token no longer count: they are neither shown nor delivered.

Letters: n live slots of the block, r of them masked (rows of the proposals), k alternatives.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from abf.decode.request import ActiveBlock, RequestState
from abf.decode.sampler import Proposals
from abf.decode.view import Action, BlockSummary, BlockView, Strategy


def _spread(slots: NDArray[np.intp], rows: NDArray[Any], n: int, empty: float) -> NDArray[Any]:
    """Rows [r, ...] at their slots of an otherwise empty [n, ...] array, read-only."""
    out = np.full((n, *rows.shape[1:]), empty, dtype=rows.dtype)
    out[slots] = rows
    out.flags.writeable = False
    return out


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    copy = array.copy()
    copy.flags.writeable = False
    return copy


def block_view(
    state: RequestState, slots: NDArray[np.intp], proposals: Proposals, *, max_steps: int
) -> BlockView:
    """View of the active block; `slots` [r] are its masked live slots, proposals their rows."""
    block = state.block
    assert block is not None
    n = block.live
    is_mask = ~block.committed[:n]
    is_mask.flags.writeable = False
    return BlockView(
        request=state.prompt.request,
        block=block.number,
        step=block.step,
        steps_left=max_steps - 1 - block.step,
        tokens_left=state.tokens_left,
        mask_id=state.mask_id,
        document_id=state.document_id,
        uids=_frozen(block.uids[:n]),
        ids=_frozen(block.ids[:n]),
        is_mask=is_mask,
        token=_spread(slots, proposals.token, n, -1),
        confidence=_spread(slots, proposals.confidence, n, np.nan),
        entropy=_spread(slots, proposals.entropy, n, np.nan),
        margin=_spread(slots, proposals.margin(), n, np.nan),
        top_ids=_spread(slots, proposals.top_ids, n, -1),
        top_probs=_spread(slots, proposals.top_probs, n, np.nan),
        commit_step=_frozen(block.commit_step[:n]),
        commit_confidence=_frozen(block.commit_confidence[:n]),
    )


def step(state: RequestState, view: BlockView, strategy: Strategy) -> None:
    """One decision: ask the strategy, apply what it says, close the block if it is whole."""
    action = strategy.decide(view, state.strategy_state)
    block = state.block
    assert block is not None
    slots, tokens = checked(view, action, name=type(strategy).__name__)
    if not len(slots):
        slots = np.nanargmax(view.confidence, keepdims=True)
        tokens = view.token[slots]
    if view.steps_left <= 0:
        slots, tokens, block.forced = _everything(view, slots, tokens)
    order = slots.argsort()
    slots, tokens = slots[order], tokens[order]
    state.commit(
        slots,
        tokens,
        prob=_probability(view, slots, tokens),
        entropy=view.entropy[slots],
        alt_ids=view.top_ids[slots],
        alt_probs=view.top_probs[slots],
        threshold=action.threshold,
    )
    if not len(block.masked()):
        state.complete()
        strategy.end_block(summary(block), state.strategy_state)


def checked(
    view: BlockView, action: Action, *, name: str
) -> tuple[NDArray[np.intp], NDArray[np.integer]]:
    """Slots and tokens [m] of an action, held against the view."""
    uids, tokens = np.asarray(action.commit.uids), np.asarray(action.commit.tokens)
    order = view.uids.argsort()
    found = np.searchsorted(view.uids, uids, sorter=order).clip(max=len(order) - 1)
    slots = order[found]
    assert (view.uids[slots] == uids).all(), f"{name} names a slot that is not in the view: {uids}"
    assert view.is_mask[slots].all(), f"{name} commits a slot that holds a token: {uids}"
    assert len(np.unique(slots)) == len(slots), f"{name} commits a slot twice: {uids}"
    assert ((tokens >= 0) & (tokens < view.mask_id)).all(), f"{name} emits {tokens}"
    return slots, tokens


def _everything(
    view: BlockView, slots: NDArray[np.intp], tokens: NDArray[np.integer]
) -> tuple[NDArray[np.intp], NDArray[np.integer], bool]:
    """The action and every other mask that would still count; whether there was one."""
    ends = slots[tokens == view.document_id]
    live = view.is_mask.copy()
    live[slots] = False
    live[int(ends.min()) if len(ends) else len(live) :] = False
    rest = np.flatnonzero(live)
    both = np.concatenate([slots, rest]), np.concatenate([tokens, view.token[rest]])
    return *both, len(rest) > 0


def _probability(
    view: BlockView, slots: NDArray[np.intp], tokens: NDArray[np.integer]
) -> NDArray[np.float32]:
    """Model probability of the committed tokens [m]; NaN for one outside the alternatives."""
    listed = view.top_ids[slots] == tokens[:, None]
    best = np.where(listed, view.top_probs[slots], -1).max(axis=1).astype(np.float32)
    best = np.where(best < 0, np.float32(np.nan), best)
    return np.where(view.token[slots] == tokens, view.confidence[slots], best)


def summary(block: ActiveBlock) -> BlockSummary:
    """What a strategy is told of a closed block."""
    return BlockSummary(
        block=block.number,
        opened=len(block.ids),
        kept=block.live,
        steps=block.step,
        forced=block.forced,
        commit_step=_frozen(block.commit_step[: block.live]),
        commit_confidence=_frozen(block.commit_confidence[: block.live]),
    )
