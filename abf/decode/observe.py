"""From engine to strategy: what is shown of a block.

Letters: n live slots of the block, r of them with proposals, E outputs of the edit head.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abf.decode.edits import ActiveBlock
from abf.decode.request import RequestState
from abf.decode.sampler import Proposals
from abf.decode.view import BlockSummary, BlockView, EditView
from abf.diffusion.policy.gates import read_gates


@dataclass(frozen=True)
class Limits:
    """How far a block may go."""

    max_steps: int
    """Decisions a block may take."""
    max_block: int
    """Slots it may grow to."""
    edits_per_slot: int
    """Substitutions of one slot."""
    forbidden: tuple[int, ...] = ()
    """Tokens that are not to be written."""


def _spread(slots: NDArray[np.intp], rows: NDArray[Any], n: int, empty: float) -> NDArray[Any]:
    """Rows [r, ...] at their slots of an otherwise empty [n, ...] array, read-only."""
    out = np.full((n, *rows.shape[1:]), empty, dtype=rows.dtype)
    out[slots] = rows
    return _sealed(out)


def _sealed(array: NDArray[Any]) -> NDArray[Any]:
    array.flags.writeable = False
    return array


def _frozen(array: NDArray[Any]) -> NDArray[Any]:
    return _sealed(array.copy())


def block_view(
    state: RequestState,
    slots: NDArray[np.intp],
    proposals: Proposals,
    *,
    limits: Limits,
    edits: Tensor | None = None,
    uniforms: NDArray[np.float64] | None = None,
    timed: bool = False,
) -> BlockView:
    """View of the active block.

    Args:
        state: its request.
        slots: [r] its live slots with proposals.
        proposals: their rows.
        limits: of the engine.
        edits: [n+1, E] what the edit head says, for strategies that need it.
        uniforms: [n+1, 3] random numbers, for timed strategies.
        timed: whether the strategy is.
    """
    block = state.block
    assert block is not None
    n = block.live
    view = BlockView(
        request=state.prompt.request,
        block=block.number,
        step=block.step,
        steps_left=limits.max_steps - 1 - block.step,
        tokens_left=state.tokens_left,
        mask_id=state.mask_id,
        document_id=state.document_id,
        forbidden=_sealed(np.array(limits.forbidden, dtype=np.int32)),
        uids=_frozen(block.uids[:n]),
        ids=_frozen(block.ids[:n]),
        is_mask=_sealed(block.ids[:n] == block.mask_id),
        token=_spread(slots, proposals.token, n, -1),
        confidence=_spread(slots, proposals.confidence, n, np.nan),
        entropy=_spread(slots, proposals.entropy, n, np.nan),
        margin=_spread(slots, proposals.margin(), n, np.nan),
        top_ids=_spread(slots, proposals.top_ids, n, -1),
        top_probs=_spread(slots, proposals.top_probs, n, np.nan),
        commit_step=_frozen(block.slots["commit_step"][:n]),
        commit_confidence=_frozen(block.slots["confidence"][:n]),
    )
    if edits is None:
        return view
    return dataclasses.replace(
        view, edit=_edit_view(state, view, edits, uniforms, limits=limits, timed=timed)
    )


def _edit_view(
    state: RequestState,
    view: BlockView,
    edits: Tensor,
    uniforms: NDArray[np.float64] | None,
    *,
    limits: Limits,
    timed: bool,
) -> EditView:
    block = state.block
    assert block is not None
    n = block.live
    gates = read_gates(edits, torch.tensor(view.is_mask))
    slots = block.slots[:n]
    room = 0 if block.oscillates else min(limits.max_block, state.tokens_left) - len(block.slots)
    locked = slots["locked"]
    insertable = np.ones(n + 1, dtype=bool)
    insertable[1:-1] = ~(locked[:-1] & locked[1:])
    insertable[n] = not (n and locked[-1] and slots["id"][-1] == state.document_id)
    spent = slots["changes"] >= limits.edits_per_slot
    return EditView(
        gap_uids=_sealed(np.concatenate([[state.last_uid], view.uids])),
        keep=_sealed(gates.keep.exp().numpy()),
        revise=_sealed(gates.revise.exp().numpy()),
        delete=_sealed(gates.delete.exp().numpy()),
        missing=_sealed(gates.missing.numpy()),
        complete=float(gates.complete.sigmoid()),
        raw=_sealed(edits.numpy()),
        locked=_frozen(locked),
        changes=_frozen(slots["changes"]),
        spent=_sealed(np.zeros_like(spent) if timed else spent),
        stable=_sealed(block.step - slots["changed"]),
        room=max(0, room),
        insertable=_sealed(insertable),
        uniforms=_sealed(np.zeros((0, 3)) if uniforms is None else uniforms),
    )


def summary(block: ActiveBlock) -> BlockSummary:
    """What a strategy is told of a closed block."""
    return BlockSummary(
        block=block.number,
        opened=block.opened,
        kept=block.live,
        steps=block.step,
        forced=block.forced,
        commit_step=_frozen(block.slots["commit_step"][: block.live]),
        commit_confidence=_frozen(block.slots["confidence"][: block.live]),
    )
