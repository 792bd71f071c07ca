"""Rows that nothing read depends on are left out, and nothing else changes.

The oracle is reachability in the dense mask, and the pass over all rows. Letters: B batch rows, L
row length, M rows of both streams.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from abf_kernels.block_attention.reference import dense_mask

from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig, PathCorruption
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.layout import (
    TwoStream,
    length_reads,
    next_token_reads,
    one_stream,
    two_stream,
)
from abf.diffusion.loss import loss_terms
from abf.diffusion.needed import Line, needed
from abf.diffusion.terms import combine, count_terms, term_weights
from tests.diffusion.path.test_reads import editing_model
from tests.diffusion.rows import make_batch, noise

L = 26
BATCH = make_batch([[[1, 3, 2, 4], [2, 5]], [[5, 1, 1], [3, 6, 2]], [[]], [[8]]], L)


def noised(batch: PackedBatch, corruption: str) -> Any:
    if corruption == "masked":
        return noise(batch, seed=3)
    path = build_corruption(PathCorruption(), mask_id=257)
    return path.apply(batch, seed=3, epochs=np.zeros(len(batch.token_ids), dtype=np.int64))


def everything(streams: TwoStream, read: torch.Tensor) -> Line:
    """Every row in place, which several batch rows cannot be in one line."""
    return Line(streams.ids, streams.positions, streams.ranges, streams.granularity, read)


@pytest.mark.parametrize("clean_stream", ["context_causal", "block_causal"])
@pytest.mark.parametrize("corruption", ["masked", "path"])
def test_what_is_left_is_what_can_be_reached(corruption, clean_stream):
    streams = two_stream(BATCH, noised(BATCH, corruption), clean_stream=clean_stream)
    B, M = streams.ids.shape
    sees = torch.block_diag(*dense_mask(streams.ranges, M).double()) > 0
    everywhere = torch.arange(B * M).view(B, M)
    order = torch.cat([part.flatten() for part in everywhere.split([streams.noisy, L], dim=1)])
    generator = torch.Generator().manual_seed(0)
    for size in (0, 1, 3, 10):
        read = torch.randperm(B * M, generator=generator)[:size]
        reached = torch.zeros(B * M, dtype=torch.bool)
        reached[read] = True
        for _ in range(B * M):
            reached |= sees[reached].any(0)
        kept = order[reached[order]]
        line = needed(streams, read)
        assert torch.equal(line.ids[0], streams.ids.flatten()[kept])
        assert torch.equal(line.positions[0], streams.positions.flatten()[kept])
        assert torch.equal(kept[line.rows], read)
        assert torch.equal(dense_mask(line.ranges, len(kept))[0], sees[kept][:, kept])


def test_last_blocks_and_what_is_no_block_are_needed_by_the_ar_loss_alone():
    """Documents of blocks [1, 3, 2, 4] and [2, 5], behind a document token each, and padding."""
    batch = make_batch([[[1, 3, 2, 4], [2, 5]]], L)
    streams = two_stream(batch, noise(batch), clean_stream="context_causal")
    blocks = torch.tensor([*range(1, 11), *range(12, 19)])  # all their noisy slots
    lengths = length_reads(batch, noisy=L).readout
    line = needed(streams, torch.cat((blocks, lengths)))
    assert line.ids.shape[1] == 17 + (19 - 4 - 5)
    ar = next_token_reads(batch, noisy=L).readout
    assert needed(streams, torch.cat((blocks, lengths, ar))).ids.shape[1] == 17 + 17
    alone = next_token_reads(batch, noisy=0).readout
    assert needed(one_stream(batch), alone).ids.shape[1] == 17


@pytest.mark.parametrize("backend", ["reference", "tiles"])
@pytest.mark.parametrize(
    ("corruption", "loss"),
    [
        ("masked", LossConfig()),
        ("masked", LossConfig(ar_weight=0)),
        ("masked", LossConfig(ar_weight=0, length_weight=0, shift=False)),
        ("masked", LossConfig(ar_weight=0, clean_stream="block_causal")),
        ("path", LossConfig()),
        ("path", LossConfig(ar_weight=0)),
        (None, None),
    ],
)
def test_losses_and_gradients_are_those_of_all_rows(corruption, loss, backend, monkeypatch):
    model = editing_model(layers=3)
    rows = None if corruption is None else noised(BATCH, corruption)
    results = []
    for keep in (needed, everything):
        monkeypatch.setattr("abf.diffusion.needed.needed", keep)
        model.zero_grad()
        terms = loss_terms(model, BATCH, noised=rows, loss=loss, backend=backend)
        total = combine(terms, count_terms(BATCH, loss), term_weights(loss))
        total.backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        results.append(({name: term.sum for name, term in terms.items()}, grads))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-10)
    torch.testing.assert_close(results[0][1], results[1][1], rtol=0, atol=1e-10)


def test_a_view_in_which_nothing_is_masked_charges_nothing():
    """The complement of a view that masks every slot."""
    batch = make_batch([[[1, 1, 1]]], 8)
    view = noise(batch)
    view.masked[:] = False
    model = editing_model()
    terms = loss_terms(
        model, batch, noised=view, loss=LossConfig(), backend="tiles", only=("nelbo",)
    )
    terms["nelbo"].sum.backward()
    assert terms["nelbo"].sum.item() == 0
    assert not any(p.grad.any() for p in model.parameters() if p.grad is not None)
