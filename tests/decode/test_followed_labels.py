"""The labels that training gives, followed through the sampler's rules until they are silent."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from abf.decode.view import Action, BlockView, Gaps, Tokens
from abf.diffusion.policy.align import align
from tests.decode.blocks import Driver, Scripted, V
from tests.diffusion.policy.test_align import MASK, cheapest


def needed(ids: list[int], finished: list[int]) -> tuple[np.ndarray, np.ndarray]:
    """Column of each slot (-1: none) and tokens missing before each, as drafts are labelled."""
    text, clean = np.array([ids]), np.array([finished])
    found = align(clean, np.array([len(finished)]), text, np.array([len(ids)]), mask_id=V)
    return found.column[0], found.missing[0]


def follower(finished: list[int]) -> Scripted:
    """Does what the labels of the text that it sees ask for, and completes when they are silent."""

    def decide(view: BlockView) -> Action:
        ids, clean = view.ids, np.array(finished)
        assert view.edit is not None
        column, missing = needed(ids.tolist(), finished)
        stands = column >= 0
        fill, wrong = stands & view.is_mask, stands & ~view.is_mask & (ids != clean[column])
        gaps = np.flatnonzero(missing)
        return Action(
            fill=Tokens(view.uids[fill], clean[column[fill]]),
            substitute=Tokens(view.uids[wrong], clean[column[wrong]]),
            delete=view.uids[~stands],
            insert=Gaps(view.edit.gap_uids[gaps], missing[gaps]),
            complete=bool(stands.all() and not (fill.any() or wrong.any() or len(gaps))),
        )

    return Scripted(decide)


def rounds(draft: list[int], finished: list[int]) -> int:
    """Steps that the labels foretell: one for what is there, one more to fill what is inserted,
    one more where an insertion has to wait for a deletion beside it."""
    column, missing = needed(draft, finished)
    gone = column < 0
    beside = np.append(gone, False) | np.insert(gone, 0, False)
    if missing.any():
        return 3 if (missing[beside] > 0).any() else 2
    return int(draft != finished)


SOME = st.lists(st.integers(1, 3), min_size=1, max_size=6)


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(draft=st.lists(st.sampled_from([1, 2, 3, V]), min_size=1, max_size=6), finished=SOME)
@example(draft=[1, 2, 3, 1, 2, 3], finished=[3])
@example(draft=[1], finished=[1, 2, 3, 1, 2, 3])
@example(draft=[2, 2, 2], finished=[1])
@example(draft=[1, 2, 3], finished=[3, 2, 1])
def test_labels_that_are_followed_give_the_text_in_the_rounds_they_foretell(
    tmp_path: Path, draft: list[int], finished: list[int]
) -> None:
    driver = Driver(tmp_path / "log")
    driver.state.open(len(draft))
    assert driver.state.block is not None
    if set(draft) != {V}:
        shown = [j for j, token in enumerate(draft) if token != V]

        def write(view: BlockView) -> Action:
            tokens = np.array([draft[j] for j in shown])
            return Action(fill=Tokens(view.uids[shown], tokens), complete=False)

        driver.step(Scripted(write))
    assert driver.ids == draft
    first = driver.state.block.step
    strategy, steps = follower(finished), 0
    while driver.state.block is not None:
        driver.step(strategy)
        steps += 1
    assert driver.state.closing is not None
    assert driver.state.closing.delivered.tolist() == finished
    assert steps == rounds(draft, finished) + 1, "and one to say that it is whole"
    done = Counter(e["type"] for e in driver.events() if e["step"] >= first)
    edits = done["SUBSTITUTE"] + done["DELETE"] + done["INSERT"]
    # A mask that is inserted is filled, and costs no more for that.
    cost = 8 * edits + done["FILL"] - done["INSERT"]
    assert cost == cheapest(tuple(MASK if t == V else t for t in draft), tuple(finished))
    assert not driver.state.closing.stalled
    assert not driver.state.closing.forced
    assert not driver.state.closing.oscillates
