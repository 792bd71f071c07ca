"""The bound of a block: what a model's rates cost against those of the conditional path.

For any rates x of a model whose texts jump as described in docs/method.md,
    -log p(y | context) <= KL(starts) + integral over tau of E sum_s' Phi(r(s->s'), x(s->s')),
    Phi(r, x) = r log(r/x) - r + x,
with r the path's rate to the same text: of the columns that are known (`one_alignment`: simple, to
train on), or expected given the text (`posterior`: never larger, the one to report; the difference
does not depend on the model). Gaps between the same two visible tokens lead to the same text when a
MASK is put into any of them, so their rates add up; leaving them apart gives a looser bound.

Letters: B blocks, n columns of the longest, m slots of the longest, V vocabulary. Values are nats,
rates are per unit of tau.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from abf.diffusion.path.align import Alignment
from abf.diffusion.path.law import PathLaw, Statuses


@dataclass(frozen=True)
class Rates:
    """What a model says at one text and time, as far as the bound reads it."""

    insert: Tensor
    """[B, m+1] rate of a new MASK in each gap."""
    substitute: Tensor
    """[B, m] rate at which a visible token is looked at anew."""
    token: Tensor
    """[B, m, n] log-probability that each slot gives each finished token."""
    own: Tensor
    """[B, m] probability that a visible slot gives the token it holds."""
    floor: Tensor
    """[B, m] mean over the vocabulary of log((1-p_u) p + p_u/V); unread where p_u = 0."""


def insert_rate(size: Tensor, decay: Tensor, tau: Tensor) -> Tensor:
    """softplus(size) * sigmoid(decay - tau), per unit of tau; dies out at the end.

    A rate that did not would insert for ever: every text shorter than the longest would have
    probability zero, and the bound would be infinite.
    """
    return torch.nn.functional.softplus(size) * torch.sigmoid(decay - tau)


def substitute_rate(size: Tensor, law: PathLaw, statuses: Statuses) -> Tensor:
    """sigmoid(size + log odds that a visible token is wrong), per unit of tau; dies out."""
    odds = (law.vocab - 1) * statuses.wrong / statuses.clean
    return torch.sigmoid(size + torch.log(odds))


def gap_groups(visible: Tensor) -> Tensor:
    """[B, m] bool -> [B, m+1] number of the group of each gap: visible tokens before it."""
    return torch.nn.functional.pad(visible.long().cumsum(dim=1), (1, 0))


def group_sums(values: Tensor, groups: Tensor, open_: Tensor) -> Tensor:
    """[B, m+1] sum of each group over its gaps that exist (`open_`); zero behind the last group."""
    kept = torch.where(open_, values, 0.0)
    return kept.new_zeros(groups.shape).scatter_add_(1, groups, kept)


def path_nats(
    rates: Rates,
    alignment: Alignment,
    *,
    clean: Tensor,
    columns: Tensor,
    text: Tensor,
    slots: Tensor,
    law: PathLaw,
    mask_id: int,
    pooled: bool = True,
) -> Tensor:
    """The integrand at one time, [B] nats per unit of tau.

    Args:
        rates: of the model.
        alignment: known or expected.
        clean: [B, n] finished tokens.
        columns: [B] how many of them.
        text: [B, m] tokens and MASKs.
        slots: [B] how many of them.
        law: of the path.
        mask_id: id of MASK.
        pooled: gaps of one group count together (the true bound of texts).
    """
    B, m = text.shape
    exists = torch.arange(m)[None, :] < slots[:, None]
    masked = (text == mask_id) & exists
    visible = (text != mask_id) & exists
    real = torch.arange(clean.shape[1])[None, :] < columns[:, None]

    gaps = gap_groups(visible) if pooled else torch.arange(m + 1).expand(B, m + 1)
    open_ = torch.arange(m + 1)[None, :] <= slots[:, None]

    due, asked = (group_sums(each, gaps, open_) for each in (alignment.absent, rates.insert))
    nats = torch.xlogy(due, due).sum(1) - _cost(due, asked).sum(1) - due.sum(1) + asked.sum(1)

    # Columns that finish as the same token lead to the same text: each token counts once.
    same = (clean[:, :, None] == clean[:, None, :]) & real[:, :, None] & real[:, None, :]
    first = real & (same.long().argmax(dim=2) == torch.arange(clean.shape[1]))
    share = alignment.column @ same.double()  # [B, m, n] that the slot finishes as this token
    low = law.wrong / law.vocab

    fill = (1 - law.wrong) * share + low
    log_fill = torch.log((1 - law.wrong) * rates.token.exp() + low) if law.wrong else rates.token
    others = law.vocab - first.sum(dim=1, keepdim=True)
    entropy = torch.where(first[:, None], torch.xlogy(fill, fill), 0.0).sum(dim=2)
    cross = _cost(torch.where(first[:, None], fill - low, 0.0), log_fill, logged=True).sum(dim=2)
    if law.wrong:
        entropy = entropy + others * low * math.log(low)
        cross = cross + law.wrong * rates.floor
    nats = nats + torch.where(masked, entropy - cross, 0.0).sum(dim=1)

    other = (text[:, :, None] != clean[:, None, :]) & first[:, None] & visible[..., None]
    change = torch.where(other, share, 0.0)
    total = change.sum(dim=2)
    jump = _cost(total, rates.substitute) + _cost(change, rates.token, logged=True).sum(dim=2)
    cost = torch.xlogy(change, change).sum(dim=2) - jump - total
    cost = cost + rates.substitute * (1 - rates.own)
    return nats + torch.where(visible, cost, 0.0).sum(dim=1)


def _cost(amount: Tensor, value: Tensor, *, logged: bool = False) -> Tensor:
    """amount * log(value), 0 where the amount is; `logged`: the value is a logarithm already."""
    # Both sides are chosen before the logarithm, whose gradient at 0 would be NaN even unread.
    some = amount > 0
    safe = torch.where(some, value, 0.0 if logged else 1.0)
    return torch.where(some, amount * (safe if logged else torch.log(safe)), 0.0)
