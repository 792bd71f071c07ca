"""From strategy to engine: hold an action to the rules, and apply it.

Only masks of the view are filled, with vocabulary ids, and only tokens substituted; a strategy that
breaks this is at fault. Beyond that an action is done as far as these rules let it:
- one operation a slot and step: delete beats substitute and fill; nothing is inserted beside a slot
  that is deleted in the same step, between two that are locked, or behind a locked document token;
- locked slots are immune; a slot is substituted at most `edits_per_slot` times (not: timed);
- a block holds at most `max_block` slots, and no more than may still be delivered; it is never left
  empty (the least likely deletion is dropped);
- a step that does nothing fills the surest mask. If there is none, the block is at a fixed point
  and is closed as stalled (not: timed);
- a text that the block has been before locks what moved since, and nothing is inserted any more:
  with the cap on substitutions this ends every block (not: timed);
- at the step cap everything left is filled and the block counts as forced.
Slots behind a locked document token no longer count: they are neither shown nor delivered. Behind
one that is not locked they are edited as ever, for it may still go (docs/decisions.md).

Letters: n live slots of the block, w writes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from abf.decode.edits import ActiveBlock, Edits
from abf.decode.observe import summary
from abf.decode.request import RequestState
from abf.decode.view import Action, BlockView, IntArray, Strategy, Tokens
from abf.diffusion.policy.need import one_block

SlotArray = NDArray[np.intp]


def step(state: RequestState, view: BlockView, strategy: Strategy) -> None:
    """One decision: ask the strategy, apply what it says, close the block if it is done."""
    action = strategy.decide(view, state.strategy_state)
    block = state.block
    assert block is not None
    name = type(strategy).__name__
    edits, closes = resolve(view, action, block, timed=strategy.timed, name=name)
    if view.edit is not None and not strategy.timed and not closes:
        _watch(view, edits, block)
    state.apply(edits)
    if closes:
        gate = float("nan") if view.edit is None else view.edit.complete
        state.complete(gate=gate, threshold=action.bars.get("COMPLETE", float("nan")))
        strategy.end_block(summary(block), state.strategy_state)


def resolve(
    view: BlockView, action: Action, block: ActiveBlock, *, timed: bool, name: str
) -> tuple[Edits, bool]:
    """What an action comes to under the rules, and whether the block is closed after it."""
    n = len(view.uids)
    locked = block.locked[:n].copy()
    delete = np.zeros(n, dtype=bool)
    delete[_slots(view, action.delete, name)] = True
    delete &= ~locked
    if n and delete.all():
        assert view.edit is not None
        delete[view.edit.delete.argmin()] = False
    new = view.ids.copy()
    commit = _writes(view, action.commit, name, masks=True)
    for slots, tokens in (
        commit,
        _writes(view, action.fill, name, masks=True),
        _writes(view, action.substitute, name, masks=False),
    ):
        assert (new[slots] == view.ids[slots]).all(), f"{name} writes a slot twice"
        new[slots] = tokens
    held = locked | delete
    if view.edit is not None:
        held |= view.edit.spent & ~view.is_mask
    new[held] = view.ids[held]
    locked[commit[0]] = locked[_slots(view, action.lock, name)] = True
    locked &= ~delete
    gaps, counts = _insertions(view, action, delete, locked & (new == view.document_id), name)

    lock = locked & ~block.locked[:n]
    changes = delete.any() or (new != view.ids).any() or len(gaps) > 0 or lock.any()
    ends = action.complete is True or view.steps_left <= 0
    if not changes and not ends and not timed:
        if view.is_mask.any():
            surest = np.where(view.is_mask, view.confidence, -1.0).argmax()
            new[surest], locked[surest] = view.token[surest], action.complete is None
        else:
            ends = block.stalled = action.complete is False
    if ends:
        gaps, counts, ends = _finish(view, action, new, delete, locked, block)
    open_ = (new == view.mask_id) & ~delete
    open_[_end(locked & (new == view.document_id)) :] = False
    closes = ends or (action.complete is None and not open_.any() and not len(gaps))
    if closes:
        stays = ~delete
        stays[_end((new == view.document_id) & stays) :] = False
        locked |= stays
    assert not (locked & ~delete & (new == view.mask_id)).any(), f"{name} locks a mask"
    return _edits(view, action, new, delete, locked & ~block.locked[:n], gaps, counts), bool(closes)


def _end(document: NDArray[np.bool_]) -> int:
    """Slots up to the first document token."""
    return int(document.argmax()) + 1 if document.any() else len(document)


def _finish(
    view: BlockView,
    action: Action,
    new: NDArray[Any],
    delete: NDArray[np.bool_],
    locked: NDArray[np.bool_],
    block: ActiveBlock,
) -> tuple[SlotArray, SlotArray, bool]:
    """Fill what still counts, instead of inserting; or, in an empty block, open a mask first."""
    none = np.zeros(0, dtype=np.intp)
    if not len(new):
        block.forced = True
        return np.zeros(1, dtype=np.intp), np.ones(1, dtype=np.intp), False
    rest = (new == view.mask_id) & ~delete
    rest[_end(locked & (new == view.document_id)) :] = False
    new[rest] = view.token[rest]
    unwilling = action.complete is False and not block.stalled
    block.forced |= bool(rest.any()) or unwilling
    return none, none, True


def _insertions(
    view: BlockView,
    action: Action,
    delete: NDArray[np.bool_],
    document: NDArray[np.bool_],
    name: str,
) -> tuple[SlotArray, SlotArray]:
    """Gaps that may get masks, ascending, and how many."""
    uids, counts = np.asarray(action.insert.uids), np.asarray(action.insert.counts)
    if not len(uids):
        return np.zeros(0, dtype=np.intp), np.zeros(0, dtype=np.intp)
    assert view.edit is not None, f"{name} inserts, but does not say that it needs edits"
    gaps = _found(view.edit.gap_uids, uids, name)
    assert (counts >= 1).all(), f"{name} inserts {counts} masks"
    order = gaps.argsort()
    gaps, counts = gaps[order], counts[order]
    beside = ~view.edit.insertable
    beside[:-1] |= delete
    beside[1:] |= delete
    beside[_end(document) if document.any() else len(beside) :] = True
    # What is deleted in this step makes no room in it: masks of the next step are none the worse.
    before = np.cumsum(counts) - counts
    counts = np.where(beside[gaps], 0, np.clip(view.edit.room - before, 0, counts))
    return gaps[counts > 0], counts[counts > 0]


def _edits(
    view: BlockView,
    action: Action,
    new: NDArray[Any],
    delete: NDArray[np.bool_],
    lock: NDArray[np.bool_],
    gaps: SlotArray,
    counts: SlotArray,
) -> Edits:
    write = np.flatnonzero((new != view.ids) & ~delete)
    tokens = new[write]
    edits = Edits(
        delete=np.flatnonzero(delete),
        write=write,
        tokens=tokens,
        gaps=gaps,
        counts=counts,
        lock=np.flatnonzero(lock),
        prob=_probability(view, write, tokens),
        entropy=view.entropy[write],
        alt_ids=view.top_ids[write],
        alt_probs=view.top_probs[write],
        bars=action.bars,
    )
    if view.edit is not None:
        gates = np.where(view.is_mask, view.edit.keep, view.edit.revise)
        edits.write_gate, edits.delete_gate = gates[write], view.edit.delete[delete]
        places = one_block(view.edit.missing, view.edit.delete, view.is_mask)
        edits.insert_gate = places.net()[gaps]
    return edits


def _watch(view: BlockView, edits: Edits, block: ActiveBlock) -> None:
    """Lock what moved, where the text is one that the block has been before."""
    before = view.ids.tobytes()
    block.seen.setdefault(before, view.step)
    since = block.seen.get(edits.ids(view.ids, view.mask_id).tobytes())
    if since is None or not edits.size:
        return
    block.oscillates = True
    n = len(view.ids)
    moved = block.slots["changed"][:n] >= since
    held = view.ids.copy()
    moved[edits.write], held[edits.write] = True, edits.tokens
    moved &= held != view.mask_id
    moved[edits.delete] = False
    lock = moved & ~block.locked[:n]
    lock[edits.lock] = True
    edits.lock = np.flatnonzero(lock)


def _slots(view: BlockView, uids: IntArray, name: str) -> SlotArray:
    return _found(view.uids, np.asarray(uids), name)


def _found(names: IntArray, uids: IntArray, name: str) -> SlotArray:
    """Places of uids among the names, each once."""
    if not len(uids):
        return np.zeros(0, dtype=np.intp)
    assert len(names), f"{name} names a slot of an empty block: {uids}"
    order = names.argsort()
    places = np.searchsorted(names, uids, sorter=order).clip(max=len(order) - 1)
    slots = order[places]
    assert (names[slots] == uids).all(), f"{name} names a slot that is not in the view: {uids}"
    assert len(np.unique(slots)) == len(slots), f"{name} names a slot twice: {uids}"
    return slots


def _writes(
    view: BlockView, wanted: Tokens, name: str, *, masks: bool
) -> tuple[SlotArray, NDArray[np.integer]]:
    slots, tokens = _slots(view, wanted.uids, name), np.asarray(wanted.tokens)
    wrong = f"{name} fills a slot that holds a token" if masks else f"{name} substitutes a mask"
    assert (view.is_mask[slots] == masks).all(), f"{wrong}: {wanted.uids}"
    assert ((tokens >= 0) & (tokens < view.mask_id)).all(), f"{name} emits {tokens}"
    banned = np.isin(tokens, view.forbidden) if len(view.forbidden) else np.zeros(0)
    assert not banned.any(), f"{name} emits {tokens}, where {view.forbidden} are forbidden"
    return slots, tokens


def _probability(
    view: BlockView, slots: SlotArray, tokens: NDArray[np.integer]
) -> NDArray[np.float32]:
    """Model probability of the tokens [w]; NaN for one outside the alternatives."""
    listed = view.top_ids[slots] == tokens[:, None]
    best = np.where(listed, view.top_probs[slots], -1).max(axis=1, initial=-1).astype(np.float32)
    best = np.where(best < 0, np.float32(np.nan), best)
    return np.where(view.token[slots] == tokens, view.confidence[slots], best)
