"""What drafts are charged: gates, missing tokens, tokens of masks and mistakes, completion.

No likelihood: surrogates that teach a sampler what to do. Which MASK of a run is one too many, and
into which gap beside a mask a token is to be inserted, nobody can know, so both are charged by
group (all gaps and masks between two visible tokens): masks share their deletions evenly, expected
missing tokens add up. Then a group's expected missing minus expected surplus is how much too short
it is.

Letters: K blocks, n columns and m slots of the longest block, R rows read, d width. Values are
nats.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from abf_kernels.masked_loss.api import Backend
from torch import Tensor
from torch.nn import functional as F

from abf.diffusion.corrupt.base import Blocks
from abf.diffusion.head import head_nll
from abf.diffusion.layout import BlockReads
from abf.diffusion.path.bound import gap_groups, group_sums
from abf.diffusion.path.reads import Heads
from abf.diffusion.policy.align import align
from abf.diffusion.policy.gates import COMPLETE, read_gates
from abf.diffusion.policy.watch import watch_complete, watch_edits

KEEP, REVISE, DELETE = range(3)


@dataclass
class DraftLabels:
    """What each draft needs."""

    text: Tensor
    """[K, m]"""
    exists: Tensor
    """[K, m] bool."""
    is_mask: Tensor
    """[K, m] bool, of slots that exist."""
    action: Tensor
    """[K, m, 3] share of KEEP, REVISE, DELETE; a mask that is kept is filled."""
    target: Tensor
    """[K, m] token that belongs in a slot; -1 where none does, or the right one stands there."""
    group: Tensor
    """[K, m+1] group of each gap, and of each mask in the gap before it."""
    missing: Tensor
    """[K, m+1] tokens missing in each group."""
    complete: Tensor
    """[K] bool."""

    @cached_property
    def rewritten(self) -> Tensor:
        """[K, m] bool, slots whose token is asked for."""
        return self.target >= 0


def labels(blocks: Blocks, *, mask_id: int) -> DraftLabels:
    """Align drafts with finished blocks."""
    found = align(blocks.clean, blocks.columns, blocks.text, blocks.slots, mask_id=mask_id)
    text, slots = torch.as_tensor(blocks.text), torch.as_tensor(blocks.slots)
    column, missing = torch.as_tensor(found.column), torch.as_tensor(found.missing)
    exists = torch.arange(text.shape[1]) < slots[:, None]
    is_mask = (text == mask_id) & exists
    group = gap_groups(exists & ~is_mask)
    clean = torch.as_tensor(blocks.clean).gather(1, column.clamp(min=0))
    stands = column >= 0
    target = torch.where(exists & stands & (text != clean), clean, -1)

    action = torch.zeros(*text.shape, 3, dtype=torch.float64)
    action[..., KEEP] = (exists & stands & ((text == clean) | is_mask)).double()
    action[..., REVISE] = (exists & stands & (text != clean) & ~is_mask).double()
    action[..., DELETE] = (exists & ~stands).double()
    before = group[:, :-1]  # a mask stands in the group of the gap before it
    masks, surplus = (
        values.new_zeros(group.shape).scatter_add_(1, before, values)
        for values in (is_mask.double(), is_mask * action[..., DELETE])
    )
    share = (surplus / masks.clamp(min=1)).gather(1, before)
    action[..., DELETE] = torch.where(is_mask, share, action[..., DELETE])
    action[..., KEEP] = torch.where(is_mask, 1 - share, action[..., KEEP])

    gaps = torch.arange(text.shape[1] + 1) <= slots[:, None]
    grouped = group_sums(missing.double(), group, gaps)
    needs = action[..., 1:].sum(dim=(1, 2)) + grouped.sum(dim=1) + is_mask.sum(dim=1)
    return DraftLabels(text, exists, is_mask, action, target, group, grouped, needs == 0)


def edit_charges(
    heads: Heads, states: Tensor, reads: BlockReads, found: DraftLabels, *, backend: Backend
) -> tuple[Tensor, Tensor, Tensor]:
    """Nats of gates, missing tokens and rewritten tokens.

    A gate costs its cross-entropy; a group that lacks c tokens and expects x costs
    c log(c/x) - c + x, least at x = c (as on the path); a masked or mistaken slot -log p of its
    token.

    Args:
        heads: of the model.
        states: [R + K*(m+1), d] of `reads.rows`.
        reads: what they belong to.
        found: what the drafts need.
        backend: back end of `abf_kernels.masked_loss`.

    Returns:
        the sum (scalar, differentiable), the nats of each draft [K] and `watch` counts (both
        without gradient).
    """
    K, m = found.text.shape
    edits = heads.edits(states[len(reads.token) :]).unflatten(0, (K, m + 1))
    gates = read_gates(edits, found.is_mask)
    said = torch.stack((gates.keep, gates.revise, gates.delete), dim=-1)
    asked = found.action > 0
    # Both sides are chosen first: -inf * 0 has no gradient.
    cost = -torch.where(asked, found.action * torch.where(asked, said, 0.0), 0.0).sum(dim=(1, 2))

    due = found.missing
    gaps = torch.arange(due.shape[1]) <= found.exists.sum(dim=1, keepdim=True)
    expected = group_sums(gates.missing, found.group, gaps)
    some = due > 0
    log = torch.where(some, due * torch.log(torch.where(some, expected, 1.0)), 0.0)
    cost = cost + (torch.xlogy(due, due) - log - due + expected).sum(dim=1)

    wanted = found.rewritten[reads.block, reads.slot]
    rows, block = wanted.nonzero()[:, 0], reads.block[wanted]
    target = found.target[block, reads.slot[wanted]]
    total, nll = head_nll(states[rows], heads.head_weight, target, backend=backend)
    nats = cost.detach().index_add(0, block, nll.to(cost.dtype))
    seen = found.exists & ~found.is_mask
    watch = watch_edits(said.detach()[seen], found.action[seen], expected.detach(), due)
    return cost.sum() + total, nats, watch


def complete_charges(heads: Heads, states: Tensor, found: DraftLabels) -> tuple[Tensor, Tensor]:
    """Binary cross-entropy of completion of each draft, [K], and `watch` counts.

    Args:
        states: [K, d] of the ends.
    """
    odds = heads.edits(states)[:, COMPLETE]
    nats = F.binary_cross_entropy_with_logits(odds, found.complete.to(odds.dtype), reduction="none")
    return nats, watch_complete(odds.detach().sigmoid(), found.complete)
