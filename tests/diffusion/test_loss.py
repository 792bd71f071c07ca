"""Loss terms through the real model: normalisation, variance, counts, lengths.

The properties are 7 and 8 of notes/training.md §4. Letters: L row length.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig
from abf.diffusion.corrupt.base import Noised
from abf.diffusion.layout import block_starts, clean_ranges, positions, run_starts
from abf.diffusion.loss import block_charges, loss_terms, scatter
from abf.diffusion.terms import combine, count_terms, term_weights
from abf.model.transformer import Transformer
from tests.diffusion.rows import make_batch, masked, noise, take, tiny_model

L = 26
BATCH = make_batch([[[1, 3, 2, 4], [2, 5]], [[5, 1, 1], [3, 6, 2]]], L)
TERMS = ("nelbo", "ar", "length")


def loss_gradients(
    model: Transformer, parts: list[tuple[PackedBatch, Any]], loss: LossConfig | None
) -> tuple[float, dict[str, Tensor]]:
    """Loss and gradients over micro-batches, normalised by counts over all of them."""
    counts = [count_terms(batch, loss) for batch, _ in parts]
    total = {name: sum(count[name] for count in counts) for name in counts[0]}
    model.zero_grad()
    value = 0.0
    for batch, noised in parts:
        terms = loss_terms(model, batch, noised=noised, loss=loss, backend="reference")
        part = combine(terms, total, term_weights(loss))
        part.backward()
        value += part.item()
    return value, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("loss", [LossConfig(), LossConfig(shift=False, ar_weight=0), None])
def test_gradient_does_not_depend_on_micro_batches_or_packing(loss):
    """The whole batch; row by row; rows in another order; every piece in a row of its own."""
    model = tiny_model()
    blocks = [[[1, 3, 2, 4], [2, 5]], [[5, 1, 1]], [[3, 6, 2]]]
    whole = make_batch(blocks, L)
    pieces = make_batch([[piece] for row in blocks for piece in row], L)
    ways = [
        [whole],
        [take(whole, [0]), take(whole, [1, 2])],
        [take(whole, [2, 0, 1])],
        [take(pieces, [3, 1]), take(pieces, [0]), take(pieces, [2])],
    ]
    results = []
    for way in ways:
        parts = [(batch, None if loss is None else noise(batch, seed=3)) for batch in way]
        results.append(loss_gradients(model, parts, loss))
    value, wanted = results[0]
    assert wanted
    for other, found in results[1:]:
        assert other == pytest.approx(value, abs=1e-10)
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], rtol=0, atol=1e-10, msg=name)


def test_counts_are_charged_tokens_and_blocks():
    counts = count_terms(BATCH, LossConfig())
    assert counts == {"nelbo": 35, "ar": 35, "length": 12}
    assert count_terms(BATCH, None) == {"ar": 35}
    assert count_terms(BATCH, LossConfig(ar_weight=0, length_weight=0)) == {"nelbo": 35}


def test_blocks_of_one_token_have_no_noise_variance():
    model = tiny_model()
    batch = make_batch([[[1] * 9, [1] * 7]], L)
    loss = LossConfig(ar_weight=0, length_weight=0)
    sums = [
        loss_terms(model, batch, noised=noise(batch, seed=seed), loss=loss, backend="reference")
        for seed in range(4)
    ]
    values = {terms["nelbo"].sum.item() for terms in sums}
    assert len(values) == 1


def test_the_bound_of_a_real_model_is_unbiased():
    """Mean over draws against N_b by enumeration of every mask of a block of three."""
    model = tiny_model()
    batch = make_batch([[[3, 3, 3]]], 10)
    loss = LossConfig(ar_weight=0, length_weight=0)

    def bounds(noised: Noised) -> np.ndarray:
        """Weighted sum of each row."""
        rows = take(batch, [0] * len(noised.masked))
        with torch.no_grad():
            charges = block_charges(
                model, rows, noised, loss=loss, backend="tiles", terms=("nelbo",)
            )
        return scatter(charges["nelbo"], rows).sum(axis=1)

    hidden, chances = np.zeros((21, 10), dtype=bool), np.zeros(21)
    for row, (start, code) in enumerate(itertools.product((1, 4, 7), range(1, 8))):
        hidden[row, start : start + 3] = [code & 1, code & 2, code & 4]
        chances[row] = 1 / 3 / math.comb(3, hidden[row].sum())
    ids = np.where(hidden, model.mask_id, batch.token_ids)
    starts = np.repeat(run_starts(batch.block_id), len(ids), axis=0)
    weight = hidden * 3.0 / hidden.sum(1, keepdims=True)
    exact = chances @ bounds(Noised(ids, starts, hidden, weight))

    draws = 1000
    for stratify in (True, False):
        corrupter = masked(stratify=stratify, mask_id=model.mask_id)
        many = take(batch, [0] * draws)
        values = bounds(corrupter.apply(many, seed=0, epochs=np.arange(draws)))
        assert abs(np.mean(values) - exact) < 4.5 * (np.var(values) / draws) ** 0.5


def test_untrained_length_head_charges_log_of_the_cap_for_every_block():
    model = tiny_model()
    torch.nn.init.zeros_(model.length_head.weight)
    charges = block_charges(
        model, BATCH, noise(BATCH), loss=LossConfig(), backend="reference", terms=("length",)
    )
    found = scatter(charges["length"], BATCH)
    np.testing.assert_allclose(
        found, np.where(block_starts(BATCH), np.log(1 + model.config.max_block), 0.0), atol=1e-12
    )


def test_length_is_read_from_the_clean_token_before_the_block():
    model = tiny_model()
    noised = noise(BATCH)
    charges = block_charges(
        model, BATCH, noised, loss=LossConfig(), backend="reference", terms=TERMS
    )
    found = scatter(charges["length"], BATCH)
    clean = model.hidden(
        torch.from_numpy(BATCH.token_ids),
        torch.from_numpy(positions(BATCH.document_id)),
        model.attend(clean_ranges(BATCH), backend="reference"),
    )
    for b, j in zip(*np.nonzero(block_starts(BATCH)), strict=True):
        length = (BATCH.block_id[b] == BATCH.block_id[b, j]).sum()
        log_probs = model.length_logits(clean[b, j - 1]).log_softmax(-1)
        assert found[b, j] == pytest.approx(-log_probs[length].item(), abs=1e-10)


def test_block_causal_refuses_the_ar_term():
    loss = LossConfig(clean_stream="block_causal", ar_weight=0)
    with pytest.raises(AssertionError, match="its own targets"):
        block_charges(
            tiny_model(), BATCH, noise(BATCH), loss=loss, backend="reference", terms=TERMS
        )
