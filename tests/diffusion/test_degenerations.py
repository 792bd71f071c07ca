"""What the losses become at the corners: other systems' losses, written here from their papers.

One token a block is the AR model in test_properties.py; the sums of the toys are in path/. Letters:
L row length, n tokens of a block.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from abf.diffusion.config import LossConfig, MaskedCorruption, PathCorruption
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.layout import predicted
from abf.diffusion.levels import noise_levels
from abf.diffusion.loss import ar_charges, block_charges, scatter
from abf.model.transformer import Transformer
from tests.diffusion.path.package import bounds, integrand, rates, start_nats, states
from tests.diffusion.path.test_reads import editing_model
from tests.diffusion.path.test_reads import noise as path_noise
from tests.diffusion.path.toy import Answer, Model, Text, World, random_model
from tests.diffusion.rows import V, make_batch, take, tiny_model

OWN_ROWS = LossConfig(shift=False, clean_stream="block_causal", ar_weight=0)


def log_probs(model: Transformer, ids: Tensor, place: Tensor, seen: Tensor) -> Tensor:
    """[M, V] of one row, by a plain pass with a dense mask [M, M]."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, enable_gqa=True
        )

    with torch.no_grad():
        return model.logits(model.hidden(ids[None], place[None], attend)[0]).log_softmax(-1)


# fixed blocks, masks alone: BD3-LM --------------------------------------------------------------


def bd3_lm_nats(
    model: Transformer, clean: Tensor, noisy: Tensor, rate: Tensor, size: int
) -> Tensor:
    """Loss of each token [n], as in arXiv 2503.09573: both streams in one row, blocks by integer
    division, 1/t times the cross-entropy of a masked token read in its own place. The document
    token is a block before the others, and never masked."""
    n = len(clean)
    block = (torch.arange(n) - 1) // size
    block, is_clean = torch.cat((block, block)), torch.arange(2 * n) >= n
    q, k, q_clean, k_clean = block[:, None], block, is_clean[:, None], is_clean
    diagonal = (q == k) & (q_clean == k_clean)
    offset = (q > k) & k_clean & ~q_clean
    causal = (q >= k) & k_clean & q_clean
    place = torch.arange(n).repeat(2)
    said = log_probs(model, torch.cat((noisy, clean)), place, diagonal | offset | causal)[:n]
    return torch.where(noisy == V, -said[torch.arange(n), clean] / rate, 0.0)


@pytest.mark.parametrize("size", [1, 4])
def test_fixed_blocks_of_masks_are_charged_as_bd3_lm_charges_them(size: int) -> None:
    """Loss by loss on the same noise, whose rate is the level that a block drew."""
    model, n = tiny_model(), 13
    batch = make_batch([[[size] * (12 // size)]], n)
    cfg = MaskedCorruption.model_validate({"law": {"kind": "uniform"}, "weight": "rate"})
    epochs = np.zeros(1, dtype=np.int64)
    hidden = 0
    for seed in range(6):
        noised = build_corruption(cfg, mask_id=V).apply(batch, seed=seed, epochs=epochs)
        charges = block_charges(
            model, batch, noised, loss=OWN_ROWS, backend="reference", terms=("nelbo",)
        )
        rate = noise_levels(batch, seed=seed, epochs=epochs, draw=0, stratify=True)[0]
        assert all(len(set(rate[start : start + size])) == 1 for start in range(1, n, size))
        clean, noisy = (torch.from_numpy(a[0]) for a in (batch.token_ids, noised.noisy_ids))
        wanted = bd3_lm_nats(model, clean, noisy, torch.from_numpy(rate), size)
        np.testing.assert_allclose(scatter(charges["nelbo"], batch)[0], wanted, rtol=1e-9)
        hidden += int(noised.masked.sum())
    assert 20 < hidden < 60, "about half of 72"


def timeless(world: World, seed: int) -> Model:
    """Tokens that know no time, and nothing but fills."""
    drawn = random_model(world, seed)

    def model(s: Text, tau: float) -> Answer:
        return replace(drawn(s, 0.0), insert=np.zeros(len(s) + 1), substitute=np.zeros(len(s)))

    return model


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_path_of_fills_alone_is_the_bound_of_masks(n: int) -> None:
    """L - (charge of n) = sum over k of 1/k E[CE sum of a random k-subset], to the last digits."""
    world = World(2, n, late=0.0, wrong=0.0)
    model, starts = timeless(world, 4), np.full(n + 1, 1 / (n + 1))
    for y in [(0,) * n, (0, 1, 1)[:n]]:
        wanted = 0.0
        for k in range(1, n + 1):
            for hidden in combinations(range(n), k):
                s = tuple(world.mask if j in hidden else y[j] for j in range(n))
                token = model(s, 0.0).token
                wanted -= sum(math.log(token[j, y[j]]) for j in hidden) / k / math.comb(n, k)
        found = bounds(world, model, starts, y)
        assert start_nats(world, starts, y) == pytest.approx(math.log(n + 1), abs=1e-12)
        for name, value in found.items():
            assert value - math.log(n + 1) == pytest.approx(wanted, abs=1e-12), name


def test_a_path_of_fills_alone_in_full_blocks_is_charged_for_masks_alone() -> None:
    """Through the model: the end of the block is seen, nothing but cross-entropy is charged, and
    the mean over draws is the bound by enumeration of masks."""
    model = editing_model(max_block=3)
    batch = make_batch([[[3]]], 4)
    clean = torch.from_numpy(batch.token_ids[0])
    place, seen = torch.arange(5), torch.ones(5, 5, dtype=torch.bool)
    seen[0, 1:] = False

    def cross_entropy(hidden: tuple[int, ...]) -> float:
        noisy = clean.clone()
        noisy[list(hidden)] = V
        ids = torch.cat((noisy, torch.tensor([model.end_id])))
        said = log_probs(model, ids, place, seen)
        return -sum(float(said[j - 1, clean[j]]) for j in hidden)

    every: dict[tuple[int, ...], float] = {
        h: cross_entropy(h) for k in range(4) for h in combinations((1, 2, 3), k)
    }
    draws = 2000
    many = take(batch, [0] * draws)
    noised = path_noise(many, PathCorruption(late=0.0, wrong=0.0))
    with torch.no_grad():
        charges = block_charges(
            model, many, noised, loss=LossConfig(), backend="tiles", terms=("nelbo",)
        )
    nats = scatter(charges["nelbo"], many)[:, 1]
    shown = noised.path.text[:, :3] == V
    wanted = [every[tuple((np.flatnonzero(hidden) + 1).tolist())] for hidden in shown]
    np.testing.assert_allclose(nats, noised.path.weight * wanted, rtol=1e-9, atol=1e-12)
    bound = sum(ce / len(h) / math.comb(3, len(h)) for h, ce in every.items() if h)
    assert abs(nats.mean() - bound) < 4.5 * nats.std() / math.sqrt(draws)


# one token a block: AR --------------------------------------------------------------------------


def test_a_path_of_one_token_a_block_is_the_ar_model() -> None:
    """Each draw is its weight times the AR loss where the slot is masked, and the mean of that
    weight is one; the length, certain, is charged by the head."""
    model = editing_model(max_block=1)
    batch = make_batch([[[1] * 9]], 10)
    many = take(batch, [0] * 400)
    noised = path_noise(many, PathCorruption(late=0.0, wrong=0.0))
    charges = block_charges(
        model, many, noised, loss=LossConfig(), backend="tiles", terms=("nelbo", "length")
    )
    ar = scatter(ar_charges(model, batch, backend="reference"), batch)[0]
    weight = np.zeros(many.token_ids.shape)
    weight[noised.path.row, noised.path.start] = noised.path.weight * (noised.path.text[:, 0] == V)
    np.testing.assert_allclose(scatter(charges["nelbo"], many), weight * ar, rtol=1e-9, atol=1e-12)
    drawn = weight[predicted(many)]
    assert abs(drawn.mean() - 1) < 4.5 * drawn.std() / math.sqrt(len(drawn))
    assert (scatter(charges["length"], many)[predicted(many)] > 0).all()


# every token late: FlexMDM ----------------------------------------------------------------------


def flexmdm_nats(said: Answer, y: Text, z: tuple[int | None, ...]) -> float:
    """Integrand of arXiv 2509.01025 at the columns z, both schedules with hazard 1: -log p of the
    token of each mask, and g - c log g + (c log c - c) of each *single* gap that lacks c and
    expects g."""
    slots = [i for i, held in enumerate(z) if held is not None]
    edges = [-1, *slots, len(z)]
    nats = -sum(math.log(said.token[k, y[i]]) for k, i in enumerate(slots) if z[i] != y[i])
    for k in range(len(edges) - 1):
        c, g = edges[k + 1] - edges[k] - 1, float(said.insert[k])
        nats += g + (c * math.log(c / g) - c if c else 0.0)
    return nats


def test_every_token_late_and_gaps_apart_is_flexmdm() -> None:
    world = World(2, 3, late=1.0, wrong=0.0)
    drawn, pooled_is_less = random_model(world, 6), 0
    for y in [(0, 1, 1), (0, 0), (1,)]:
        for tau in (0.05, 0.6, 2.0):
            at = states(world, y, np.array([tau]))
            said = rates(world, drawn, at)
            said = replace(said, substitute=torch.zeros_like(said.substitute))
            apart = integrand(world, said, at, at.known, pooled=False)
            pooled = integrand(world, said, at, at.known)
            for k, (z, _) in enumerate(world.columns(y, tau)):
                answer: Any = drawn(at.texts[k], tau)
                if len(at.texts[k]) == world.longest:  # theirs has no longest block
                    answer = replace(answer, insert=np.zeros(len(at.texts[k]) + 1))
                assert float(apart[k]) == pytest.approx(flexmdm_nats(answer, y, z), abs=1e-10)
            assert (pooled <= apart + 1e-10).all()
            pooled_is_less += int((pooled < apart - 1e-3).sum())
    assert pooled_is_less > 5, "pooled, it is another number"


# one block is the text: MDLM --------------------------------------------------------------------


@pytest.mark.parametrize("shift", [True, False])
def test_one_block_is_masked_diffusion_of_the_whole_text(shift: bool) -> None:
    model, n = tiny_model(max_block=12), 13
    batch = make_batch([[[12]]], n)
    corrupter = build_corruption(MaskedCorruption(), mask_id=V)
    noised = corrupter.apply(batch, seed=2, epochs=np.zeros(1, int))
    loss = LossConfig(shift=shift, ar_weight=0)
    charges = block_charges(model, batch, noised, loss=loss, backend="reference", terms=("nelbo",))
    seen = torch.ones(n, n, dtype=torch.bool)
    seen[0, 1:] = False  # the text's opening is context: it hears nothing of the text
    clean, noisy = (torch.from_numpy(a[0]) for a in (batch.token_ids, noised.noisy_ids))
    said = log_probs(model, noisy, torch.arange(n), seen)
    hidden = np.flatnonzero(noised.masked[0])
    assert 1 < len(hidden) < 12
    wanted = np.zeros(n)
    wanted[hidden] = [-float(said[j - shift, clean[j]]) * 12 / len(hidden) for j in hidden]
    np.testing.assert_allclose(scatter(charges["nelbo"], batch)[0], wanted, atol=1e-10)
