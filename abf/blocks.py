"""From segments to blocks: the one rule shared by packing, mask, loss and decoder.

A segment longer than the cap becomes ceil(n / cap) parts whose lengths differ by at most one, the
longer ones first; a shorter segment is a block. The rule looks at one segment at a time, so that a
permutation of segment lengths gives a permutation of block lengths.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


def block_lengths(segment_lengths: npt.ArrayLike, max_block: int) -> IntArray:
    """Lengths of the blocks of consecutive segments, in order.

    Args:
        segment_lengths: int [N], each at least 1.
        max_block: longest block S in tokens.

    Returns:
        int64 [K], K >= N, with the same sum.
    """
    lengths = np.asarray(segment_lengths, dtype=np.int64)
    assert max_block >= 1
    assert lengths.ndim == 1
    assert not lengths.size or lengths.min() >= 1
    parts = -(-lengths // max_block)
    index = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    short, longer = lengths // parts, lengths % parts
    return np.repeat(short, parts) + (index < np.repeat(longer, parts))


def cut_lengths(starts: npt.ArrayLike, extra: npt.ArrayLike, total: int) -> IntArray:
    """Segment lengths after further cuts.

    Args:
        starts: int [N] segment starts in [0, total), the first is 0.
        extra: int [M] further cuts in [0, total), for example where a row ends.
        total: number of slots.

    Returns:
        int64 lengths of the pieces between neighbouring cuts; they sum to `total`.
    """
    cuts = np.union1d(np.asarray(starts, dtype=np.int64), np.asarray(extra, dtype=np.int64))
    assert total == 0 or (cuts.size and cuts[0] == 0 and cuts[-1] < total)
    return np.diff(cuts, append=total)
