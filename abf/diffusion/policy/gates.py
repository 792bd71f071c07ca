"""What the edit head's raw numbers say of a block that is being edited.

Policy, not path: these probabilities say what a draft needs, with no notion of time, and have no
part in the bound (docs/method.md).

Letters: m slots of a block; gap i lies before slot i, gap m before the end of the block.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

EDITS = ("insert", "insert_until", "substitute", "revise", "delete", "missing", "complete")
"""Outputs of the edit head, raw numbers read at a slot's own state: size and end of the insertion
rate before the slot and rate of substitution (of the path: `abf.diffusion.path.bound`); log-odds of
substitution and deletion, tokens missing before the slot, and, at the end of a block, log-odds that
it is complete (of the policy)."""
INSERT, UNTIL, SUBSTITUTE, REVISE, DELETE, MISSING, COMPLETE = range(len(EDITS))
"""Their columns."""


@dataclass
class Gates:
    """Log-probabilities of keep, revise and delete, and what is missing."""

    keep: Tensor
    """[..., m] log P(slot stays): a token as it is, a mask to be filled."""
    revise: Tensor
    """[..., m] log P(another token belongs here); -inf at a mask."""
    delete: Tensor
    """[..., m] log P(nothing belongs here)."""
    missing: Tensor
    """[..., m+1] expected tokens missing in each gap."""
    complete: Tensor
    """[...] log-odds that the block is whole and right as it is."""


def read_gates(edits: Tensor, is_mask: Tensor) -> Gates:
    """Gates of blocks whose slots and end have these raw numbers.

    A token is kept, revised or deleted (softmax over 0 and two log-odds), a mask filled or deleted.

    Args:
        edits: [..., m+1, len(EDITS)], the end of the block last.
        is_mask: [..., m] bool.
    """
    inside = edits[..., :-1, :]
    odds = torch.stack(
        (
            torch.zeros_like(inside[..., REVISE]),
            inside[..., REVISE].masked_fill(is_mask, -torch.inf),
            inside[..., DELETE],
        ),
        dim=-1,
    )
    keep, revise, delete = odds.log_softmax(dim=-1).unbind(dim=-1)
    return Gates(keep, revise, delete, F.softplus(edits[..., MISSING]), edits[..., -1, COMPLETE])
