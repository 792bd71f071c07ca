"""Counter-based random numbers: uniform, independent, and a function of nothing but counters."""

import itertools

import numpy as np

from abf.diffusion.rng import hash64, uniform


def splitmix(x: int) -> int:
    """SplitMix64's finaliser on Python integers: an independent rendering."""
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


def test_equals_the_same_hash_on_python_integers():
    golden = 0x9E3779B97F4A7C15
    for counters in [(0,), (1, 2), (2, 1), (7, -1, 2**40), (1, 2, 0)]:
        state = len(counters) * golden % 2**64
        for counter in counters:
            word = splitmix((counter + golden) % 2**64)
            state = splitmix(((state ^ word) + golden) % 2**64)
        assert int(hash64(*counters)) == state


def test_a_vector_of_counters_gives_what_each_gives_alone():
    documents, places = np.arange(-1, 5)[:, None], np.arange(7)
    table = uniform(3, documents, places)
    for i, j in itertools.product(range(6), range(7)):
        assert table[i, j] == uniform(3, i - 1, j)


def test_order_and_number_of_counters_matter():
    values = [hash64(1, 2), hash64(2, 1), hash64(1, 2, 0), hash64(0, 1, 2), hash64(1), hash64(2)]
    assert len({int(value) for value in values}) == len(values)


def test_neighbouring_counters_are_uniform_and_uncorrelated():
    u = uniform(0, np.arange(300)[:, None], np.arange(300))
    assert u.min() >= 0
    assert u.max() < 1
    counts = np.bincount((u.ravel() * 64).astype(int), minlength=64)
    expected = u.size / 64
    chi2 = float(((counts - expected) ** 2 / expected).sum())
    assert chi2 < 63 + 5 * (2 * 63) ** 0.5
    for a, b in [(u[1:], u[:-1]), (u[:, 1:], u[:, :-1]), (u, uniform(1, *np.ogrid[:300, :300]))]:
        assert abs(np.corrcoef(a.ravel(), b.ravel())[0, 1]) < 5 / a.size**0.5
