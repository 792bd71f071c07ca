"""Terms of the loss: what each is charged for, how much it weighs, and their sum.

The terms themselves are in `abf.diffusion.loss`. Letters: B batch rows, L row length, R rows read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig
from abf.diffusion.layout import block_starts, predicted


@dataclass
class Term:
    """One part of the loss over one micro-batch."""

    sum: Tensor
    """Scalar, nats, differentiable."""
    count: int
    """Tokens or blocks charged in this micro-batch."""
    watch: Tensor | None = None
    """See `Charges`."""


@dataclass
class Charges:
    """Negative log-likelihoods of one term: their sum, and one by one."""

    sum: Tensor
    """Scalar, differentiable."""
    nll: Tensor
    """[R], weighted, without gradient."""
    slot: Tensor
    """[R] int64, flat index in B*L of the slot each belongs to (first slot of a block: length)."""
    watch: Tensor | None = None
    """Counts of how well a head does (`abf.diffusion.policy.watch`), if it is watched."""


def term_weights(loss: LossConfig | None) -> dict[str, float]:
    """Weight of every term that is computed; None is the AR objective."""
    if loss is None:
        return {"ar": 1.0}
    weights = {
        "nelbo": 1.0,
        "ar": loss.ar_weight,
        "length": loss.length_weight,
        "edit": loss.edit_weight,
        "complete": loss.complete_weight,
        "distil": loss.distil_weight,
    }
    return {name: weight for name, weight in weights.items() if weight > 0}


def count_terms(batch: PackedBatch, loss: LossConfig | None) -> dict[str, int]:
    """Count of every term, without a forward pass (to be summed over ranks and micro-batches)."""
    tokens = int(predicted(batch).sum())
    blocks = int(block_starts(batch).sum())
    counts = dict.fromkeys(("nelbo", "ar", "edit", "distil"), tokens)
    counts |= {"length": blocks, "complete": blocks}
    return {name: counts[name] for name in term_weights(loss)}


def combine(
    terms: Mapping[str, Term], global_counts: Mapping[str, int], weights: Mapping[str, float]
) -> Tensor:
    """Loss to differentiate: sum over terms of weight * sum / global count."""
    parts = [weights[name] / max(global_counts[name], 1) * term.sum for name, term in terms.items()]
    return torch.stack(parts).sum()
