"""Random numbers that are a pure function of integer counters.

A draw depends on what it is for (seed, epoch, document, index ...) and on nothing else: not on the
batch it sits in, the worker that makes it, the number of ranks, or what was drawn before.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Finaliser of SplitMix64 (Steele, Lea, Flood 2014): a bijection that flips half the bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash64(*counters: ArrayLike) -> NDArray[np.uint64]:
    """64 well-mixed bits of a tuple of integers; arguments broadcast against each other.

    The order of the counters matters, and so does their number: hash64(1, 2), hash64(2, 1) and
    hash64(1, 2, 0) are unrelated.
    """
    with np.errstate(over="ignore"):  # wrapping is the arithmetic meant here
        state = np.asarray(np.uint64(len(counters))) * _GOLDEN
        for counter in counters:
            word = np.asarray(counter, dtype=np.int64).astype(np.uint64)
            state = _mix((state ^ _mix(word + _GOLDEN)) + _GOLDEN)
        return state


def uniform(*counters: ArrayLike) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) with 53 random bits, one for each tuple of counters."""
    return (hash64(*counters) >> np.uint64(11)).astype(np.float64) * 2.0**-53
