"""Estimators of the block bound N_b = sum over k of 1/k E[CE sum over a random k-subset].

Exact, by enumerating every mask pattern in rational arithmetic (notes/training.md §3.3, referee
note §4), then the real corruption against the same N_b by a z-test. Letters: S block length.
"""

import itertools
import math
from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest

from tests.diffusion.rows import make_batch, masked

Mask = tuple[int, ...]
"""Indices of the masked slots."""


def cross_entropy(mask: Mask, slot: int) -> Fraction:
    """A made-up rational CE of a masked slot, different for every mask and slot."""
    code = sum(2**i for i in mask)
    return Fraction(1 + (37 * code + 101 * slot + 13 * code * slot) % 97, 17)


def ce_sum(mask: Mask) -> Fraction:
    return sum((cross_entropy(mask, slot) for slot in mask), Fraction(0))


def subsets(size: int, k: int) -> list[Mask]:
    return list(itertools.combinations(range(size), k))


def bound(size: int) -> Fraction:
    """N_b."""
    return sum(
        (
            Fraction(1, k) * sum(map(ce_sum, subsets(size, k)), Fraction(0)) / math.comb(size, k)
            for k in range(1, size + 1)
        ),
        Fraction(0),
    )


def power_integral(a: int, b: int) -> Fraction:
    """Integral of t^a (1-t)^b over [0, 1]."""
    return Fraction(math.factorial(a) * math.factorial(b), math.factorial(a + b + 1))


def bernoulli(size: int, weighted: Callable[[int], tuple[int, Fraction]]) -> Fraction:
    """E over t ~ U(0,1) and Bernoulli(t) masks; `weighted(k)` = power of t divided out, factor."""
    total = Fraction(0)
    for k in range(1, size + 1):
        power, factor = weighted(k)
        chance = power_integral(k - power, size - k)
        total += factor * chance * sum(map(ce_sum, subsets(size, k)), Fraction(0))
    return total


def k_subset(size: int, proposal: list[Fraction], weight: Callable[[int], Fraction]) -> Fraction:
    """E over K ~ proposal (index K - 1), a uniform K-subset, and a weight."""
    return sum(
        (
            proposal[k - 1]
            * weight(k)
            * sum(map(ce_sum, subsets(size, k)), Fraction(0))
            / math.comb(size, k)
            for k in range(1, size + 1)
        ),
        Fraction(0),
    )


SIZES = range(1, 7)


@pytest.mark.parametrize("size", SIZES)
def test_uniform_k_with_weight_size_over_k_is_exact(size):
    uniform = [Fraction(1, size)] * size
    assert k_subset(size, uniform, lambda k: Fraction(size, k)) == bound(size)


@pytest.mark.parametrize("size", SIZES)
def test_any_proposal_with_its_importance_weight_is_exact(size):
    total = size * (size + 1) // 2
    skewed = [Fraction(k, total) for k in range(1, size + 1)]
    assert k_subset(size, skewed, lambda k: 1 / (k * skewed[k - 1])) == bound(size)


@pytest.mark.parametrize("size", SIZES)
def test_bernoulli_masks_with_weight_one_over_t_are_exact(size):
    assert bernoulli(size, lambda k: (1, Fraction(1))) == bound(size)


@pytest.mark.parametrize("size", SIZES)
def test_dividing_by_the_realised_rate_misweighs_by_block_length(size):
    """EMRS: t ~ U, Bernoulli masks, weight S/K, is S/(S+1) of the bound; why it is not used."""
    found = bernoulli(size, lambda k: (0, Fraction(size, k)))
    assert found == bound(size) * Fraction(size, size + 1)


def proposals(size: int) -> list[list[Fraction]]:
    """Laws of K on 0..size: uniform without and with the empty view, and one that grows."""
    total = Fraction((size + 1) * (size + 2), 2)
    uniform = [Fraction(0)] + [Fraction(1, size)] * size
    return [
        uniform,
        [Fraction(1, size + 1)] * (size + 1),
        [(k + 1) / total for k in range(size + 1)],
    ]


def pair(size: int, law: list[Fraction], weight: Callable[[int, int], Fraction]) -> Fraction:
    """E of a view with K ~ law masks plus its complement; `weight` of (masks of the view, K)."""
    total = Fraction(0)
    for k, chance in enumerate(law):
        for mask in subsets(size, k):
            other = tuple(sorted(set(range(size)) - set(mask)))
            both = sum((weight(len(m), k) * ce_sum(m) for m in (mask, other) if m), Fraction(0))
            total += chance * both / math.comb(size, k)
    return total


@pytest.mark.parametrize("size", SIZES)
def test_a_pair_weighs_by_how_often_a_count_comes_in_either_view(size):
    for law in proposals(size):
        both = [law[k] + law[size - k] for k in range(size + 1)]
        assert pair(size, law, lambda k, first, both=both: 1 / (k * both[k])) == bound(size)


@pytest.mark.parametrize("size", SIZES[1:])
def test_the_first_views_weight_is_wrong_for_its_complement(size):
    """Half of what is exact for one view alone, given to both."""
    found = pair(size, proposals(size)[0], lambda k, first: Fraction(size, 2 * max(first, 1)))
    assert found != bound(size)


@pytest.mark.parametrize("size", SIZES)
def test_a_head_that_is_told_the_time_needs_the_time_that_fits_the_count(size):
    """CE linear in t. Given K masks t is Beta(K, S-K+1), of mean K/(S+1); drawn apart from K, of
    mean 1/2, it is biased."""

    def told(mask: Mask, slot: int) -> tuple[Fraction, Fraction]:
        return cross_entropy(mask, slot), cross_entropy(mask, size - slot)  # at t: first + second t

    def mean(mask: Mask, t: Fraction) -> Fraction:
        return sum((a + b * t for a, b in (told(mask, slot) for slot in mask)), Fraction(0))

    exact = Fraction(0)  # t ~ U, Bernoulli(t) masks, weight 1/t, integrated over t
    for k in range(1, size + 1):
        for mask in subsets(size, k):
            for a, b in (told(mask, slot) for slot in mask):
                exact += a * power_integral(k - 1, size - k) + b * power_integral(k, size - k)

    def counted(time: Callable[[int], Fraction]) -> Fraction:
        return sum(
            (
                Fraction(1, k) * mean(mask, time(k)) / math.comb(size, k)
                for k in range(1, size + 1)
                for mask in subsets(size, k)
            ),
            Fraction(0),
        )

    assert counted(lambda k: Fraction(k, size + 1)) == exact
    assert (counted(lambda k: Fraction(1, 2)) == exact) == (size == 1)


@pytest.mark.parametrize("stratify", [True, False])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_corruption_draws_the_bound_without_bias(size, stratify):
    """Blocks of one size, each a sample; pieces (which share a starting point) are the units."""
    blocks, row = 4, 1 + 4 * size
    batch = make_batch([[[size] * blocks]] * 8, row)
    corrupter = masked(stratify=stratify)
    samples = []
    for epoch in range(400):
        noised = corrupter.apply(batch, seed=1, epochs=np.full(8, epoch))
        for hidden, weight in zip(noised.masked, noised.weight, strict=True):
            value = 0.0
            for start in range(1, row, size):
                mask = tuple(np.nonzero(hidden[start : start + size])[0].tolist())
                value += sum(
                    float(cross_entropy(mask, slot)) * weight[start + slot] for slot in mask
                )
            samples.append(value / blocks)
    error = np.std(samples) / len(samples) ** 0.5
    assert abs(np.mean(samples) - float(bound(size))) < 4.5 * error
    # The tolerance would not let EMRS's bias through.
    assert 4.5 * error < float(bound(size)) / (size + 1) / 2
