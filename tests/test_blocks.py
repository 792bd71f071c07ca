"""The segment-to-block rule against its definition."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from abf.blocks import block_lengths, cut_lengths

lengths = st.lists(st.integers(1, 300), max_size=30)


@given(segments=lengths, cap=st.integers(1, 70))
def test_near_equal_parts_longer_first(segments: list[int], cap: int) -> None:
    expected: list[int] = []
    for n in segments:
        parts = math.ceil(n / cap)
        expected += [n // parts + (i < n % parts) for i in range(parts)]
    found = block_lengths(segments, cap).tolist()
    assert found == expected
    assert sum(found) == sum(segments)
    assert all(1 <= one <= cap for one in found)


@given(segments=lengths, cap=st.integers(1, 70), data=st.data())
def test_a_permutation_of_segments_permutes_the_blocks(
    segments: list[int], cap: int, data: st.DataObject
) -> None:
    shuffled = data.draw(st.permutations(segments))
    assert sorted(block_lengths(segments, cap)) == sorted(block_lengths(shuffled, cap))


def test_known_values() -> None:
    assert block_lengths([5, 64, 65, 130, 1], 64).tolist() == [5, 64, 33, 32, 44, 43, 43, 1]
    assert cut_lengths([0, 3, 9], [0, 5, 9], 12).tolist() == [3, 2, 4, 3]
    assert cut_lengths([0], [0], 4).tolist() == [4]
