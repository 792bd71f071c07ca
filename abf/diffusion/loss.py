"""Losses of block diffusion and of the AR model, as sums with counts.

Letters: B batch rows, L row length, R rows read, d width, V vocabulary, S longest block. All values
are nats. Terms: `nelbo`, the bound on the text given the cuts (sum of S_b/K-weighted cross-entropy
over masked slots); `ar`, next-token cross-entropy on the clean stream; `length`, -log p(S_b | the
text before the block), which turns the bound into one on text *and* cuts. A term's count is what
its sum is divided by: charged tokens (nelbo, ar) or charged blocks (length). The division takes
global counts, over ranks and accumulation steps, so a gradient does not depend on how a batch was
split (notes/training.md §3.3).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from abf_kernels.block_attention.api import Backend
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig
from abf.diffusion.corrupt.base import Noised
from abf.diffusion.head import head_nll
from abf.diffusion.layout import (
    block_starts,
    clean_ranges,
    length_reads,
    mask_reads,
    next_token_reads,
    positions,
    predicted,
    two_stream,
)


class Backbone(Protocol):
    """What a loss needs of the model (`abf.model.transformer.Transformer`)."""

    def hidden(
        self, ids: Tensor, positions: Tensor, attend: Any, *, rows: Tensor | None = None
    ) -> Tensor: ...

    @property
    def head_weight(self) -> Tensor: ...

    def length_logits(self, hidden: Tensor) -> Tensor: ...

    def attend(self, ranges: Tensor, *, backend: Backend) -> Any: ...


@dataclass
class Term:
    """One part of the loss over one micro-batch."""

    sum: Tensor
    """Scalar, nats, differentiable."""
    count: int
    """Tokens or blocks charged in this micro-batch."""


@dataclass
class Charges:
    """Negative log-likelihoods of one term: their sum, and one by one."""

    sum: Tensor
    """Scalar, differentiable."""
    nll: Tensor
    """[R], weighted, without gradient."""
    slot: Tensor
    """[R] int64, flat index in B*L of the slot each belongs to (first slot of a block: length)."""


def term_weights(loss: LossConfig | None) -> dict[str, float]:
    """Weight of every term that is computed; None is the AR objective."""
    if loss is None:
        return {"ar": 1.0}
    weights = {"nelbo": 1.0, "ar": loss.ar_weight, "length": loss.length_weight}
    return {name: weight for name, weight in weights.items() if weight > 0}


def count_terms(batch: PackedBatch, loss: LossConfig | None) -> dict[str, int]:
    """Count of every term, without a forward pass (to be summed over ranks and micro-batches)."""
    tokens = int(predicted(batch).sum())
    counts = {"nelbo": tokens, "ar": tokens, "length": int(block_starts(batch).sum())}
    return {name: counts[name] for name in term_weights(loss)}


def loss_terms(
    model: Backbone,
    batch: PackedBatch,
    *,
    noised: Noised | None,
    loss: LossConfig | None,
    backend: Backend,
) -> dict[str, Term]:
    """Forward pass over a micro-batch.

    Args:
        model: the transformer.
        batch: clean rows.
        noised: their noisy stream; None (with `loss` None) trains the AR model on the clean stream
            alone.
        loss: settings of the block objective.
        backend: attention back end.
    """
    counts = count_terms(batch, loss)
    if loss is None:
        assert noised is None, "the AR objective has no noisy stream"
        charges = {"ar": ar_charges(model, batch, backend=backend)}
    else:
        assert noised is not None, "the block objective needs a noisy stream"
        charges = block_charges(
            model, batch, noised, loss=loss, backend=backend, terms=counts.keys()
        )
    return {name: Term(charges[name].sum, counts[name]) for name in counts}


def combine(
    terms: Mapping[str, Term], global_counts: Mapping[str, int], weights: Mapping[str, float]
) -> Tensor:
    """Loss to differentiate: sum over terms of weight * sum / global count."""
    parts = [weights[name] / max(global_counts[name], 1) * term.sum for name, term in terms.items()]
    return torch.stack(parts).sum()


def ar_charges(model: Backbone, batch: PackedBatch, *, backend: Backend) -> Charges:
    """Next-token NLL of every charged token, from the clean stream alone."""
    reads = next_token_reads(batch, noisy=0)
    states = model.hidden(
        torch.from_numpy(batch.token_ids),
        torch.from_numpy(positions(batch.document_id)),
        model.attend(clean_ranges(batch), backend=backend),
        rows=reads.readout,
    )
    return Charges(*head_nll(states, model.head_weight, reads.target), reads.slot)


def block_charges(
    model: Backbone,
    batch: PackedBatch,
    noised: Noised,
    *,
    loss: LossConfig,
    backend: Backend,
    terms: Collection[str],
) -> dict[str, Charges]:
    """Charges of the named terms from one pass over both streams.

    `nelbo` is weighted, so its sum is an unbiased draw of the bound. Only rows that some term reads
    go through the last layer's MLP and the heads.
    """
    assert "ar" not in terms or loss.clean_stream == "context_causal", (
        "a block-causal clean stream sees its own targets"
    )
    streams = two_stream(batch, noised, clean_stream=loss.clean_stream)
    reads = {
        "nelbo": mask_reads(batch, noised, shift=loss.shift),
        "ar": next_token_reads(batch, noisy=streams.noisy),
        "length": length_reads(batch, noisy=streams.noisy),
    }
    # A clean row may serve several terms; its state is computed once.
    rows, where = torch.unique(
        torch.cat([reads[name].readout for name in terms]), return_inverse=True
    )
    attend = model.attend(streams.ranges, backend=backend)
    states = model.hidden(streams.ids, streams.positions, attend, rows=rows)
    charges = {}
    for name, at in zip(terms, where.split([len(reads[n].slot) for n in terms]), strict=True):
        target, slot = reads[name].target, reads[name].slot
        if name == "length":
            logits = model.length_logits(states[at])
            wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nll = F.cross_entropy(wide, target, reduction="none")
            charges[name] = Charges(nll.sum(), nll.detach(), slot)
        else:
            weight = torch.from_numpy(noised.weight[noised.masked]) if name == "nelbo" else None
            total, nll = head_nll(states[at], model.head_weight, target, weight)
            charges[name] = Charges(total, nll, slot)
    return charges


def scatter(charges: Charges, batch: PackedBatch) -> NDArray[np.float64]:
    """Charges at their slots, [B, L] nats, 0 where nothing is charged; to be summed by document."""
    flat = np.zeros(batch.token_ids.size, dtype=np.float64)
    np.add.at(flat, charges.slot.numpy(), charges.nll.double().numpy())
    return flat.reshape(batch.token_ids.shape)
