"""The rules of the edit machinery: each by example, then all of them under random strategies."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abf.decode.observe import Limits
from abf.decode.replay import replay
from abf.decode.view import Action, BlockView, Gaps, Tokens
from tests.decode.blocks import Driver, Scripted, V


def ints(*values: int) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def act(driver: Driver, **operations: Any) -> None:
    """One step of the named operations, with slots and gaps by place instead of by uid."""

    def decide(view: BlockView) -> Action:
        found: dict[str, Any] = {"complete": False}
        for name, value in operations.items():
            if name in ("commit", "fill", "substitute"):
                found[name] = Tokens(view.uids[list(value)], ints(*value.values()))
            elif name == "insert":
                assert view.edit is not None
                found[name] = Gaps(view.edit.gap_uids[list(value)], ints(*value.values()))
            elif name in ("delete", "lock"):
                found[name] = view.uids[value]
            else:
                found[name] = value
        return Action(**found)

    driver.step(Scripted(decide))


@pytest.fixture
def driver(tmp_path: Path) -> Driver:
    """A block of 1 2 3 4, filled."""
    found = Driver(tmp_path / "log")
    found.state.open(4)
    act(found, fill={0: 1, 1: 2, 2: 3, 3: 4})
    return found


def test_operations_apply_to_the_slots_they_name(driver: Driver) -> None:
    act(driver, delete=[0], substitute={2: 30}, insert={4: 2, 2: 1})
    assert driver.ids == [2, V, 30, 4, V, V]
    step = [e for e in driver.events() if e["step"] == 1]
    assert [e["type"] for e in step] == ["DELETE", "SUBSTITUTE", "INSERT", "INSERT", "INSERT"]
    # Uids: context 0..2, the block 3..6; gaps from right to left, each gap from left to right.
    assert [(e["uid"], e["left_uid"]) for e in step[2:]] == [(7, 6), (8, 7), (9, 4)]
    assert [(e["uid"], e["old_id"], e["new_id"]) for e in step[:2]] == [(3, 1, -1), (5, 3, 30)]


def test_delete_beats_substitute_and_fill(driver: Driver) -> None:
    act(driver, insert={0: 1})
    act(driver, delete=[0, 2], substitute={2: 9, 4: 9}, fill={0: 8})
    assert driver.ids == [1, 3, 9]


def test_nothing_is_inserted_beside_a_deleted_slot(driver: Driver) -> None:
    act(driver, delete=[1], insert={0: 1, 1: 1, 2: 1, 3: 1})
    assert driver.ids == [V, 1, 3, V, 4]


def test_locked_slots_are_immune(driver: Driver) -> None:
    act(driver, lock=[1, 2])
    act(driver, delete=[1], substitute={2: 9, 3: 9})
    assert driver.ids == [1, 2, 3, 9]
    commits = [e for e in driver.events() if e["type"] == "COMMIT"]
    assert [(e["uid"], e["new_id"], e["step"]) for e in commits] == [(4, 2, 1), (5, 3, 1)]


def test_a_slot_is_substituted_so_often(driver: Driver) -> None:
    for token in (11, 12, 13, 14):
        act(driver, substitute={0: token}, insert={4: 1})
    assert driver.ids[0] == 13, "three times, as the limits say"


def test_a_block_does_not_outgrow_its_limits(tmp_path: Path, driver: Driver) -> None:
    act(driver, insert={0: 5, 4: 9})
    assert driver.ids == [V] * 5 + [1, 2, 3, 4] + [V] * 3
    short = Driver(tmp_path / "short", new_tokens=5)
    short.state.open(3)
    act(short, insert={0: 9})
    assert len(short.ids) == 5


def test_a_block_is_never_left_empty(driver: Driver) -> None:
    act(driver, delete=[0, 1, 2, 3])
    assert len(driver.ids) == 1


def test_nothing_is_inserted_behind_a_locked_document_token(driver: Driver) -> None:
    act(driver, substitute={1: 0})
    act(driver, lock=[1])
    act(driver, insert={2: 1, 1: 1})
    assert driver.ids == [1, V, 0, 3, 4]
    act(driver, fill={1: 7}, complete=True)
    assert driver.state.closing is not None
    assert driver.state.closing.delivered.tolist() == [1, 7, 0]


def test_a_step_of_nothing_fills_the_surest_mask(driver: Driver) -> None:
    act(driver, insert={2: 2})
    act(driver, delete=[])
    assert driver.ids.count(V) == 1


def test_nothing_is_inserted_between_two_locked_slots(driver: Driver) -> None:
    act(driver, lock=[1, 2])
    act(driver, insert={2: 1, 1: 1, 3: 1})
    assert driver.ids == [1, V, 2, 3, V, 4]


def test_a_fixed_point_is_closed_as_stalled(driver: Driver) -> None:
    act(driver, complete=False)
    assert driver.state.block is None
    driver.state.written(np.zeros(4))
    sample = driver.state.sample()
    assert (sample.stalled_blocks, sample.forced_blocks) == (1, 0)
    assert Counter(e["type"] for e in driver.events())["STALLED_COMPLETE"] == 1


def test_completion_fills_what_is_left_and_is_then_forced(driver: Driver) -> None:
    act(driver, insert={2: 2})
    act(driver, complete=True)
    assert driver.state.closing is not None
    assert V not in driver.state.closing.delivered
    driver.state.written(np.zeros(6))
    sample = driver.state.sample()
    assert (sample.stalled_blocks, sample.forced_blocks) == (0, 1)


def test_an_empty_block_gets_a_mask_before_it_is_closed(tmp_path: Path) -> None:
    driver = Driver(tmp_path / "log")
    patient = Scripted(lambda view: Action(complete=view.step >= 3), timed=True)
    assert driver.block(patient, 0) == 5, "three idle steps, one that inserts, one that fills"
    sample = driver.state.sample()
    assert sample.forced_blocks == 1
    assert len(sample.token_ids) == 1


@pytest.mark.parametrize(
    ("operation", "message"),
    [
        (lambda v: Action(substitute=Tokens(v.uids[v.is_mask][:1], ints(1))), "substitutes a mask"),
        (lambda v: Action(fill=Tokens(v.uids[~v.is_mask][:1], ints(1))), "fills a slot that holds"),
        (lambda v: Action(lock=v.uids[v.is_mask][:1]), "locks a mask"),
        (lambda v: Action(delete=v.uids[[0, 0]]), "twice"),
        (lambda v: Action(insert=Gaps(ints(77), ints(1))), "not in the view"),
        (lambda v: Action(insert=Gaps(v.uids[:1], ints(0))), "inserts"),
        (
            lambda v: Action(
                fill=Tokens(v.uids[v.is_mask][:1], ints(1)),
                commit=Tokens(v.uids[v.is_mask][:1], ints(2)),
            ),
            "writes a slot twice",
        ),
    ],
)
def test_a_strategy_at_fault_is_named(driver: Driver, operation: Any, message: str) -> None:
    act(driver, insert={0: 1})
    with pytest.raises(AssertionError, match=f"Scripted.*{message}"):
        driver.step(Scripted(operation))


# --- oscillation ---------------------------------------------------------------------------------


def restless(kind: str) -> Scripted:
    """Never completes, and undoes what it did."""

    def decide(view: BlockView) -> Action:
        n, edit = len(view.ids), view.edit
        assert edit is not None
        masks = view.uids[view.is_mask]
        if kind == "flips":
            tokens = Tokens(view.uids, np.where(view.ids == 1, 2, 1))
            if len(masks):
                return Action(fill=tokens, complete=False)
            return Action(substitute=tokens, complete=False)
        if kind == "masks":  # a mask is deleted at one end, and one inserted at the other
            if n < 2:
                return Action(insert=Gaps(edit.gap_uids[:1], ints(2)), complete=False)
            insert = Gaps(edit.gap_uids[:1], ints(1))
            return Action(delete=view.uids[-1:], insert=insert, complete=False)
        if kind == "breathes" and (n > 3 or not view.is_mask.any()) and n > 1:
            return Action(delete=view.uids[1:], complete=False)
        if kind == "swaps" and not view.is_mask.any():
            return Action(delete=view.uids[-1:], insert=Gaps(edit.gap_uids[:1], ints(1)),
                          complete=False)  # fmt: skip
        fill = Tokens(masks, np.full(len(masks), 7))
        return Action(fill=fill, insert=Gaps(edit.gap_uids[-1:], ints(2)), complete=False)

    return Scripted(decide)


@pytest.mark.parametrize("kind", ["flips", "masks", "breathes", "swaps", "grows"])
def test_a_restless_strategy_ends(tmp_path: Path, kind: str) -> None:
    """Not by the step cap, which lies two thousand steps away."""
    driver = Driver(tmp_path / "log", limits=Limits(2000, 12, 3), new_tokens=40)
    blocks = 0
    while not driver.state.ended:
        assert driver.block(restless(kind), 5) <= 60
        blocks += 1
    sample = driver.state.sample()
    assert sample.forced_blocks == 0
    assert sample.stalled_blocks == blocks
    # In a last block of one slot there is nothing to swing between.
    assert sample.oscillating_blocks >= (blocks - 1 if kind != "grows" else 0)
    driver.trace.close()
    assert replay(driver.path)[0] == sample.token_ids.tolist()


def test_what_moved_is_locked_where_a_text_comes_back(driver: Driver) -> None:
    """1 2 3 4 -> 1 2 3 9 -> 1 2 3 4: the last slot is held, and nothing is inserted."""
    act(driver, substitute={3: 9})
    act(driver, substitute={3: 4})
    act(driver, substitute={3: 9, 0: 8}, insert={0: 3})
    assert driver.ids == [8, 2, 3, 4]
