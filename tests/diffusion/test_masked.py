"""The masked corruption: its law, its counters, and that it cannot see the batch around it."""

import itertools
import math

import numpy as np
import pytest

from abf.diffusion.layout import block_lengths, predicted
from tests.diffusion.rows import V, make_batch, masked, noise, take

L = 32
BATCH = make_batch([[[3, 1, 5], [4, 4]], [[8, 2, 1, 1], [7]]], L)


@pytest.mark.parametrize("stratify", [True, False])
def test_every_subset_of_a_block_comes_as_often_as_the_law_says(stratify):
    """P(subset of size K) = 1/S / C(S, K), weight exactly S/K, for blocks of every length to 5."""
    batch = make_batch([[[1, 2, 3, 4, 5]]], 16)
    draws = 6000
    epochs = np.zeros(1, dtype=np.int64)
    corrupter = masked(stratify=stratify)
    seen: dict[int, dict[tuple[bool, ...], int]] = {size: {} for size in range(1, 6)}
    for seed in range(draws):
        noised = corrupter.apply(batch, seed=seed, epochs=epochs)
        start = 1
        for size in range(1, 6):
            mask = noised.masked[0, start : start + size]
            assert mask.any()
            expected = np.where(mask, size / mask.sum(), 0.0)
            assert (noised.weight[0, start : start + size] == expected).all()
            key = tuple(mask.tolist())
            seen[size][key] = seen[size].get(key, 0) + 1
            start += size
    for size, found in seen.items():
        chi2 = 0.0
        subsets = [m for m in itertools.product([False, True], repeat=size) if any(m)]
        for subset in subsets:
            expected = draws / size / math.comb(size, sum(subset))
            chi2 += (found.pop(subset, 0) - expected) ** 2 / expected
        assert not found
        freedom = len(subsets) - 1
        assert chi2 < freedom + 5 * max(2 * freedom, 1) ** 0.5


def test_only_masked_slots_change():
    noised = noise(BATCH)
    assert (noised.noisy_ids[noised.masked] == V).all()
    assert (noised.noisy_ids[~noised.masked] == BATCH.token_ids[~noised.masked]).all()
    assert (noised.weight[~noised.masked] == 0).all()
    assert not noised.masked[~predicted(BATCH)].any()


def test_blocks_of_one_token_are_always_masked_with_weight_one():
    batch = make_batch([[[1] * 12, [1] * 9]], L)
    for seed in range(20):
        noised = noise(batch, seed=seed)
        assert (noised.masked == predicted(batch)).all()
        assert (noised.weight[noised.masked] == 1).all()


def test_noise_does_not_depend_on_the_batch():
    whole = masked().apply(BATCH, seed=5, epochs=np.array([2, 3]))
    for row, epoch in [(0, 2), (1, 3)]:
        alone = masked().apply(take(BATCH, [row]), seed=5, epochs=np.array([epoch]))
        assert (alone.masked[0] == whole.masked[row]).all()
        assert (alone.weight[0] == whole.weight[row]).all()
    # Nor on where in a row its piece was packed.
    moved = make_batch([[[7]]], L, first_piece=3)
    alone = masked().apply(moved, seed=5, epochs=np.array([3]))
    there = BATCH.document_id == 3
    assert (alone.masked[moved.document_id == 3] == whole.masked[there]).all()


def test_seed_epoch_and_draw_each_change_the_noise():
    def masks(seed: int, epoch: int, draw: int) -> bytes:
        epochs = np.full(2, epoch)
        return masked().apply(BATCH, seed=seed, epochs=epochs, draw=draw).masked.tobytes()

    drawn = [masks(*key) for key in itertools.product(range(3), repeat=3)]
    assert len(set(drawn)) == len(drawn)
    assert masks(1, 2, 0) == masks(1, 2, 0)


@pytest.mark.parametrize("stratify", [True, False])
def test_seed_epoch_and_draw_each_change_how_many_are_masked(stratify):
    """A document whose noise level stayed the same would be taught at that level alone."""
    batch = make_batch([[[40]]], 41)

    def count(seed: int, epoch: int, draw: int) -> int:
        noised = masked(stratify=stratify).apply(
            batch, seed=seed, epochs=np.array([epoch]), draw=draw
        )
        return int(noised.masked.sum())

    for name, keys in (
        ("seed", [(k, 0, 0) for k in range(12)]),
        ("epoch", [(0, k, 0) for k in range(12)]),
        ("draw", [(0, 0, k) for k in range(12)]),
    ):
        assert len({count(*key) for key in keys}) > 6, name


def test_documents_and_blocks_are_masked_independently():
    """Among equal blocks with equally many masks, the hidden places differ."""
    batch = make_batch([[[6, 6], [6, 6]]], L)
    corrupter = masked(stratify=False)
    patterns: dict[int, set[bytes]] = {}
    differ = {(1, 7): 0, (1, 14): 0, (7, 20): 0}
    for seed in range(60):
        hidden = corrupter.apply(batch, seed=seed, epochs=np.zeros(1, dtype=np.int64)).masked[0]
        for (a, b), count in differ.items():
            one, other = hidden[a : a + 6], hidden[b : b + 6]
            differ[a, b] = count + (one.sum() == other.sum() and (one != other).any())
        patterns.setdefault(int(hidden[1:7].sum()), set()).add(hidden[1:7].tobytes())
    assert all(count >= 3 for count in differ.values()), differ
    assert len(patterns[3]) > 3


@pytest.mark.parametrize("by", ["blocks", "draws"])
def test_stratified_levels_vary_less_than_independent_ones(by):
    """Estimate of a bound whose cross-entropy falls with what is visible: CE(K) = K."""
    batch = make_batch([[[8] * 3]], L) if by == "blocks" else make_batch([[[8]]], L)
    draws = 1 if by == "blocks" else 3

    def variance(stratify: bool) -> tuple[float, float]:
        corrupter, found = masked(stratify=stratify), []
        for seed in range(400):
            value = 0.0
            for draw in range(draws):
                noised = corrupter.apply(batch, seed=seed, epochs=np.zeros(1, int), draw=draw)
                masks = block_lengths(batch) / np.where(noised.masked, noised.weight, np.inf)
                value += float((noised.weight * masks**2).sum())
            found.append(value)
        return float(np.var(found)), float(np.mean(found))

    (low, mean), (high, other) = variance(True), variance(False)
    assert low < 0.6 * high
    assert abs(mean - other) < 5 * ((low + high) / 400) ** 0.5
