"""Alignments against a search over all of them, and against what applying them gives."""

from __future__ import annotations

from functools import cache

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from abf.diffusion.policy.align import align

MASK = 4
FINISHED = st.lists(st.integers(0, 3), max_size=7)
DRAFT = st.lists(st.integers(0, MASK), max_size=7)


def cheapest(draft: tuple[int, ...], clean: tuple[int, ...]) -> int:
    """Cost of the best alignment, by trying every one."""

    @cache
    def rest(i: int, j: int) -> int:
        ways = []
        if i < len(draft):
            ways.append(8 + rest(i + 1, j))
        if j < len(clean):
            ways.append(8 + rest(i, j + 1))
        if i < len(draft) and j < len(clean):
            pair = 1 if draft[i] == MASK else 0 if draft[i] == clean[j] else 8
            ways.append(pair + rest(i + 1, j + 1))
        return min(ways, default=0)

    return rest(0, 0)


def padded(lines: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    width = max(1, *(len(line) for line in lines))
    return (
        np.array([line + [0] * (width - len(line)) for line in lines]),
        np.array([len(line) for line in lines]),
    )


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(FINISHED, DRAFT), min_size=1, max_size=4))
def test_labels_are_cheapest_and_lead_to_the_finished_block(
    pairs: list[tuple[list[int], list[int]]],
) -> None:
    (clean, columns), (text, slots) = padded([p[0] for p in pairs]), padded([p[1] for p in pairs])
    found = align(clean, columns, text, slots, mask_id=MASK)
    for k, (finished, draft) in enumerate(pairs):
        column, missing = found.column[k], found.missing[k]
        assert (column[len(draft) :] == -1).all()
        assert not missing[len(draft) + 1 :].any()
        # Apply: what stands for a column becomes it, the rest goes, gaps are filled in order.
        made, cost, at = [], 0, 0
        for i in range(len(draft) + 1):
            made += finished[at : at + missing[i]]
            at += missing[i]
            cost += 8 * int(missing[i])
            if i == len(draft):
                break
            if column[i] < 0:
                cost += 8
                continue
            assert column[i] == at
            made.append(finished[at])
            same = draft[i] == finished[at]
            cost += 1 if draft[i] == MASK else 0 if same else 8
            at += 1
        assert made == finished
        assert cost == cheapest(tuple(draft), tuple(finished))


def test_ties_are_broken_one_way() -> None:
    """Of two equal tokens the later is kept where one is too many: read from the end, pairs come
    first."""
    clean, columns = padded([[1, 2], [1], [1, 2]])
    text, slots = padded([[1, 2, 1, 2], [MASK, MASK], [MASK, 2]])
    found = align(clean, columns, text, slots, mask_id=MASK)
    assert found.column[0].tolist() == [-1, -1, 0, 1]
    assert found.column[1, :2].tolist() == [-1, 0]
    assert found.column[2, :2].tolist() == [0, 1]
