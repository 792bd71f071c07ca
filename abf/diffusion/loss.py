"""Losses of block diffusion and of the AR model, as sums with counts.

Letters: B batch rows, L row length, R rows read, d width, V vocabulary, S longest block. All values
are nats. Terms: `nelbo`, the bound on the text given the cuts (sum of S_b/K-weighted cross-entropy
over masked slots, or the path's integrand); `ar`, next-token cross-entropy on the clean stream;
`length`, -log p(S_b | the text before the block), on a path the cost of the number of masks at its
start, which turns the bound into one on text *and* cuts; `edit` and `complete`, what drafts teach,
`distil`, how far the student is from a teacher: no likelihoods. A term's count is what its sum is
divided by: charged blocks (length, complete) or charged tokens. The division takes global counts,
over ranks and accumulation steps, so a gradient does not depend on how a batch was split
(notes/training.md §3.3).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from abf_kernels.block_attention.api import Backend
from numpy.typing import NDArray
from torch import Tensor

from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig
from abf.diffusion.corrupt.base import Blocks, Noised
from abf.diffusion.corrupt.path import PathNoised
from abf.diffusion.device import on_its_device
from abf.diffusion.guide import Guide, guide_nats
from abf.diffusion.head import head_nll
from abf.diffusion.layout import (
    BlockReads,
    Reads,
    block_reads,
    length_reads,
    mask_reads,
    next_token_reads,
    one_stream,
    two_stream,
)
from abf.diffusion.needed import Layers, read_states
from abf.diffusion.path.law import PathLaw
from abf.diffusion.path.reads import path_charges
from abf.diffusion.policy.reads import DraftLabels, complete_charges, edit_charges, labels
from abf.diffusion.terms import Charges, Term, count_terms


class Backbone(Layers, Protocol):
    """What a loss needs of the model (`abf.model.transformer.Transformer`)."""

    @property
    def head_weight(self) -> Tensor: ...

    @property
    def mask_id(self) -> int: ...

    @property
    def max_block(self) -> int: ...

    def length_logits(self, hidden: Tensor, granularity: Tensor | None = None) -> Tensor: ...

    def edits(self, hidden: Tensor) -> Tensor: ...


def loss_terms(
    model: Backbone,
    batch: PackedBatch,
    *,
    noised: Noised | PathNoised | None,
    loss: LossConfig | None,
    backend: Backend,
    only: Collection[str] | None = None,
    guide: Guide | None = None,
) -> dict[str, Term]:
    """Forward pass over a micro-batch.

    Args:
        model: the transformer.
        batch: clean rows.
        noised: their noisy stream; None (with `loss` None) trains the AR model on the clean stream
            alone.
        loss: settings of the block objective.
        backend: back end of the operators.
        only: terms to compute of the block objective's; all by default.
        guide: what a teacher says of the masked slots; none charges nothing for it.
    """
    counts = count_terms(batch, loss)
    if only is not None:
        counts = {name: count for name, count in counts.items() if name in only}
    if loss is None:
        assert noised is None, "the AR objective has no noisy stream"
        charges = {"ar": ar_charges(model, batch, backend=backend)}
    else:
        assert noised is not None, "the block objective needs a noisy stream"
        charges = block_charges(
            model, batch, noised, loss=loss, backend=backend, terms=counts.keys(), guide=guide
        )
    return {name: Term(charges[name].sum, counts[name], charges[name].watch) for name in counts}


@on_its_device
def ar_charges(model: Backbone, batch: PackedBatch, *, backend: Backend) -> Charges:
    """Next-token NLL of every charged token, from the clean stream alone."""
    reads = next_token_reads(batch, noisy=0)
    states = read_states(model, one_stream(batch), reads.readout, backend=backend)
    return Charges(*head_nll(states, model.head_weight, reads.target, backend=backend), reads.slot)


@on_its_device
def block_charges(
    model: Backbone,
    batch: PackedBatch,
    noised: Noised | PathNoised,
    *,
    loss: LossConfig,
    backend: Backend,
    terms: Collection[str],
    aligned: bool = False,
    guide: Guide | None = None,
) -> dict[str, Charges]:
    """Charges of the named terms from one pass over both streams.

    `nelbo` is weighted, so its sum is an unbiased draw of the bound. Only rows that some term reads
    go through the last layer's MLP and the heads.

    Args:
        aligned: charge a path by its expectation over alignments, which is what a bound should be
            reported by; a known alignment is cheaper to train on and has the same gradient in
            expectation.
        guide: see `loss_terms`.
    """
    assert "ar" not in terms or loss.clean_stream == "context_causal", (
        "a block-causal clean stream sees its own targets"
    )
    streams = two_stream(batch, noised, clean_stream=loss.clean_stream)
    noisy, L = streams.noisy, batch.token_ids.shape[1]

    def nelbo() -> _Reading:
        if isinstance(noised, PathNoised):
            path, law = noised.path, noised.law
            reads = block_reads(path, noisy=noisy, L=L, shift=loss.shift)

            def charge(states: Tensor) -> Charges:
                nats = path_charges(
                    model, states, reads, path, law=law, longest=model.max_block, aligned=aligned
                )
                return Charges(nats.sum(), nats.detach(), _first_slots(path, L))

            return _Reading(reads.rows, charge)
        reads = mask_reads(batch, noised, shift=loss.shift)
        return _tokens(model, reads, torch.as_tensor(noised.weight[noised.masked]), backend)

    def length() -> _Reading:
        reads = length_reads(batch, noisy=noisy)
        law = noised.law if isinstance(noised, PathNoised) else PathLaw(0, 0, model.mask_id)
        told = None
        if batch.granularity is not None:
            told = torch.as_tensor(batch.granularity).flatten()[reads.slot]

        def charge(states: Tensor) -> Charges:
            logits = model.length_logits(states, told)
            wide = torch.promote_types(logits.dtype, torch.float32)
            nats = law.length_nats(logits.log_softmax(dim=1, dtype=wide), reads.target)
            return Charges(nats.sum(), nats.detach(), reads.slot)

        return _Reading(reads.readout, charge)

    def ar() -> _Reading:
        return _tokens(model, next_token_reads(batch, noisy=noisy), None, backend)

    @functools.cache
    def drafts() -> tuple[Blocks, DraftLabels, BlockReads, float]:
        assert isinstance(noised, PathNoised), "only beside a path are there drafts"
        found = labels(noised.drafts, mask_id=model.mask_id)
        reads = block_reads(noised.drafts, noisy=noisy, L=L, shift=loss.shift)
        return noised.drafts, found, reads, noised.draft_share

    def edit() -> _Reading:
        blocks, found, reads, share = drafts()

        def charge(states: Tensor) -> Charges:
            total, nats, watch = edit_charges(model, states, reads, found, backend=backend)
            return Charges(total / share, nats / share, _first_slots(blocks, L), watch)

        return _Reading(reads.rows, charge)

    def complete() -> _Reading:
        blocks, found, reads, share = drafts()

        def charge(states: Tensor) -> Charges:
            nats, watch = complete_charges(model, states, found)
            nats = nats / share
            return Charges(nats.sum(), nats.detach(), _first_slots(blocks, L), watch)

        return _Reading(reads.ends, charge)

    def distil() -> _Reading:
        assert isinstance(noised, Noised), "a teacher speaks of masks in their places"
        reads = mask_reads(batch, noised, shift=loss.shift)

        def charge(states: Tensor) -> Charges:
            if guide is None:
                return Charges(states.sum() * 0, states.new_zeros(len(states)), reads.slot)
            nats = guide_nats(states, model.head_weight, guide)
            return Charges(nats.sum(), nats.detach(), reads.slot)

        return _Reading(reads.readout, charge)

    build = {"nelbo": nelbo, "ar": ar, "length": length, "edit": edit, "complete": complete}
    build["distil"] = distil
    readings = {name: build[name]() for name in terms}
    # A clean row may serve several terms; its state is computed once.
    rows, where = torch.unique(
        torch.cat([reading.rows for reading in readings.values()]), return_inverse=True
    )
    states = read_states(model, streams, rows, backend=backend)
    parts = where.split([len(reading.rows) for reading in readings.values()])
    return {
        name: reading.charge(states[at])
        for (name, reading), at in zip(readings.items(), parts, strict=True)
    }


def _first_slots(blocks: Blocks, L: int) -> Tensor:
    """[K] slots that block charges are booked at, in B*L."""
    return torch.as_tensor(blocks.row * L + blocks.start)


@dataclass
class _Reading:
    """Rows a term reads, in B*(M+L), and what it makes of their states."""

    rows: Tensor
    charge: Callable[[Tensor], Charges]


def _tokens(model: Backbone, reads: Reads, weight: Tensor | None, backend: Backend) -> _Reading:
    """Cross-entropy of single tokens."""

    def charge(states: Tensor) -> Charges:
        total, nll = head_nll(states, model.head_weight, reads.target, weight, backend=backend)
        return Charges(total, nll, reads.slot)

    return _Reading(reads.readout, charge)


def scatter(charges: Charges, batch: PackedBatch) -> NDArray[np.float64]:
    """Charges at their slots, [B, L] nats, 0 where nothing is charged; to be summed by document."""
    flat = np.zeros(batch.token_ids.size, dtype=np.float64)
    np.add.at(flat, charges.slot.cpu().numpy(), charges.nll.double().cpu().numpy())
    return flat.reshape(batch.token_ids.shape)
