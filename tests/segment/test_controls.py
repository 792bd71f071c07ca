"""The two controls: equal lengths, and the reference's lengths in a random order."""

from __future__ import annotations

from math import ceil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abf.blocks import block_lengths
from abf.errors import ConfigError
from abf.segment import fixed, random
from abf.segment.base import Document, Segments
from abf.segment.config import FixedSegmenter, RandomSegmenter, SentenceSegmenter
from abf.segment.fixed import Fixed, matching_length
from abf.segment.random import Random


def document(n_tokens: int, doc_id: str = "d") -> Document:
    return Document(doc_id, "x" * n_tokens, "en", np.arange(n_tokens))


@given(n=st.integers(0, 200), length=st.integers(1, 250))
def test_fixed_lengths(n: int, length: int) -> None:
    found = Fixed(length).segment(document(n), None)
    lengths = np.diff(found.start, append=n + 1).tolist()
    assert sum(lengths) == n + 1
    assert lengths[:-1] == [length] * (len(lengths) - 1)
    assert 1 <= lengths[-1] <= length


@given(
    slots=st.lists(st.integers(1, 60), min_size=1, max_size=8),
    longest=st.integers(1, 70),
    data=st.data(),
)
def test_matching_length_is_the_nearest_of_all(
    slots: list[int], longest: int, data: st.DataObject
) -> None:
    n_blocks = data.draw(st.integers(len(slots), sum(slots)))
    mean = sum(slots) / n_blocks
    distance = {
        length: abs(sum(slots) / sum(ceil(n / length) for n in slots) - mean)
        for length in range(1, min(longest, max(slots)) + 1)
    }
    found = matching_length(np.array(slots), n_blocks, longest=longest)
    assert distance[found] == min(distance.values())


def test_matching_length_corrects_for_remainders() -> None:
    # Documents of 25 slots with a mean segment of 12.5: cutting at 12 leaves a segment of 1.
    assert matching_length(np.array([25] * 10), 20, longest=64) == 13


starts = st.sets(st.integers(1, 80), max_size=30).map(lambda cuts: [0, *sorted(cuts)])


@given(start=starts, seed=st.integers(-3, 3), cap=st.integers(1, 20))
def test_random_keeps_the_lengths(start: list[int], seed: int, cap: int) -> None:
    doc = document(80)
    found = Random(seed).segment(doc, Segments.rule(start))
    before = np.diff(start, append=doc.n_slots)
    after = np.diff(found.start, append=doc.n_slots)
    assert found.start[0] == 0
    assert sorted(after) == sorted(before)
    assert sorted(block_lengths(after, cap)) == sorted(block_lengths(before, cap))


def test_random_depends_on_seed_and_document_only() -> None:
    reference = Segments.rule([0, 1, 3, 6, 10, 15, 21, 28, 36, 45, 55])

    def cuts(seed: int, doc_id: str) -> list[int]:
        return Random(seed).segment(document(80, doc_id), reference).start.tolist()

    assert cuts(0, "a") == cuts(0, "a")
    assert len({tuple(cuts(seed, name)) for seed in range(4) for name in "abcd"}) == 16


@given(slots=st.lists(st.integers(1, 6), min_size=1, max_size=40), seed=st.integers(0, 5))
def test_documents_of_equal_length_exchange_their_lengths(slots: list[int], seed: int) -> None:
    lengths = np.array(slots)
    donors = Random(seed).donors(lengths)
    assert sorted(donors) == list(range(len(slots)))
    assert (lengths[donors] == lengths).all()
    kept = np.flatnonzero(donors == np.arange(len(slots)))
    assert all(slots.count(slots[n]) == 1 for n in kept)
    assert (Random(seed).donors(lengths) == donors).all()


def test_random_is_uniform_over_orders() -> None:
    """Three different lengths have six orders: each within 5 standard deviations of a sixth."""
    reference = Segments.rule([0, 1, 3])
    seen: dict[tuple[int, ...], int] = {}
    for n in range(3000):
        found = Random(0).segment(document(7, f"doc-{n}"), reference)
        lengths = tuple(np.diff(found.start, append=8).tolist())
        seen[lengths] = seen.get(lengths, 0) + 1
    assert len(seen) == 6
    assert all(abs(count - 500) < 5 * np.sqrt(3000 * 1 / 6 * 5 / 6) for count in seen.values())


def test_a_control_without_its_reference(tmp_path: Path) -> None:
    like = SentenceSegmenter()
    with pytest.raises(ConfigError, match="random needs the segments of `like`"):
        random.build(RandomSegmenter(like=like), tokens=tmp_path, reference=None, max_block=None)
    with pytest.raises(ConfigError, match="fixed needs `length`, or the segments of `like`"):
        fixed.build(FixedSegmenter(like=like), tokens=tmp_path, reference=None, max_block=None)
