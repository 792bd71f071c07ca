"""Random strategies against the rules of the edit machinery, and logs that break them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abf.decode.events import CODE
from abf.decode.observe import Limits
from abf.decode.replay import Folded, RuleError, fold
from abf.decode.trace import read_trace
from abf.decode.view import Action, BlockView, Gaps, Tokens
from tests.decode.blocks import Driver, Scripted, V

# --- random strategies ---------------------------------------------------------------------------


def reckless(seed: int, busy: float) -> Scripted:
    """Asks for anything that the interface allows, conflicts included."""
    rng = np.random.default_rng(seed)

    def decide(view: BlockView) -> Action:
        n = len(view.ids)
        assert view.edit is not None

        def some(of: np.ndarray, rate: float = busy) -> np.ndarray:
            return of[rng.random(len(of)) < rate]

        masks = rng.permutation(view.uids[view.is_mask])
        half = len(masks) // 2
        commit, fill = some(masks[:half]), some(masks[half:])
        change, gaps = some(view.uids[~view.is_mask]), some(view.edit.gap_uids)
        complete = [None, False, False, True][int(rng.choice(4, p=[0.02, 0.6, 0.36, 0.02]))]
        return Action(
            commit=Tokens(commit, rng.integers(0, V, len(commit))),
            fill=Tokens(fill, rng.integers(0, V, len(fill))),
            substitute=Tokens(rng.permutation(change), rng.integers(0, 4, len(change))),
            delete=rng.permutation(some(view.uids)),
            insert=Gaps(rng.permutation(gaps), rng.integers(1, 4, len(gaps))),
            lock=some(view.uids[~view.is_mask], busy / 4) if n else view.uids,
            complete=complete,
        )

    return Scripted(decide)


class PlainFold:
    """The rules of the log in dictionaries, written without `abf.decode.replay`."""

    def __init__(self, limits: Limits, budget: int) -> None:
        self.limits, self.budget = limits, budget
        self.text: list[int] = []
        self.block: list[int] = []
        self.holds: dict[int, int] = {}
        self.locked: set[int] = set()
        self.changes: Counter[int] = Counter()
        self.used: set[int] = set()
        self.opened, self.closed = 0, 0

    def take(self, events: list[dict[str, Any]]) -> None:
        """All events of one step."""
        kinds = [e["type"] for e in events]
        order = {"OPEN": 0, "REOPEN": 0, "DELETE": 1, "SUBSTITUTE": 2, "FILL": 2, "INSERT": 3,
                 "COMMIT": 4}  # fmt: skip
        if all(kind in order for kind in kinds):
            ranks = [order[kind] for kind in kinds]
            assert ranks == sorted(ranks)
            edited = [e["uid"] for e in events if e["type"] in ("DELETE", "SUBSTITUTE", "FILL")]
            assert len(edited) == len(set(edited)), "one operation a slot and step"
            if "REOPEN" not in kinds:
                self.check_gaps(events)
        for event in events:
            self.one(event)
        assert len(self.block) <= min(self.limits.max_block, self.budget - len(self.text))

    def check_gaps(self, events: list[dict[str, Any]]) -> None:
        """No insertion touches a slot that is deleted in the same step."""
        gone = {e["uid"] for e in events if e["type"] == "DELETE"}
        before = self.block
        for event in events:
            if event["type"] == "INSERT" and event["left_uid"] in before:
                at = before.index(event["left_uid"])
                assert not gone & set(before[at : at + 2])

    def one(self, event: dict[str, Any]) -> None:
        uid, kind = event["uid"], event["type"]
        if kind == "PROMPT":
            self.used.add(uid)
        elif kind == "OPEN":
            assert not self.block
            self.opened += 1
        elif kind == "INSERT":
            assert uid not in self.used
            self.used.add(uid)
            left = event["left_uid"]
            self.block.insert(self.block.index(left) + 1 if left in self.block else 0, uid)
            self.holds[uid] = V
        elif kind in ("FILL", "SUBSTITUTE", "DELETE"):
            assert uid in self.block
            assert uid not in self.locked
            assert (self.holds[uid] == V) == (kind == "FILL") or kind == "DELETE"
            assert event["old_id"] == self.holds[uid]
            if kind == "DELETE":
                self.block.remove(uid)
            else:
                self.holds[uid] = event["new_id"]
                self.changes[uid] += kind == "SUBSTITUTE"
                assert self.changes[uid] <= self.limits.edits_per_slot
        elif kind == "COMMIT":
            assert uid in self.block
            assert self.holds[uid] == event["new_id"] < V
            self.locked.add(uid)
        elif kind.endswith("COMPLETE"):
            self.closed += 1
            kept = self.block[: event["length"]]
            assert set(kept) <= self.locked
            self.text += [self.holds[u] for u in kept]
            self.pending, self.block = kept, []
        elif kind == "REOPEN":
            self.closed -= 1
            self.block = self.pending
            self.text = self.text[: -len(self.block)]
            self.locked -= set(self.block)
        elif kind == "KV_WRITE":
            assert self.holds[uid] == event["new_id"]


@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    seed=st.integers(0, 2**32 - 1),
    busy=st.floats(0.0, 0.7),
    length=st.integers(1, 12),
    limits=st.builds(Limits, st.integers(1, 30), st.integers(1, 14), st.integers(0, 3)),
    reopen=st.booleans(),
)
def test_whatever_a_strategy_asks_for_the_rules_hold(
    tmp_path: Path, seed: int, busy: float, length: int, limits: Limits, reopen: bool
) -> None:
    driver = Driver(tmp_path / "log", limits=limits, new_tokens=14, seed=seed)
    strategy = reckless(seed, busy)
    while not driver.state.ended:
        decisions = driver.block(strategy, min(length, limits.max_block), reopen=reopen)
        assert decisions <= 2 * limits.max_steps + 2
    driver.trace.close()
    sample = driver.state.sample()
    header, events, complete = read_trace(driver.path)
    assert complete
    plain = PlainFold(limits, 14)
    group: list[dict[str, Any]] = []
    for event in events.to_pylist():
        if (group and (event["block"], event["step"], event["nfe"]) != (
            group[-1]["block"], group[-1]["step"], group[-1]["nfe"],
        )) or event["type"].endswith("COMPLETE"):  # fmt: skip
            plain.take(group)
            group = []
        group.append(event)
        if event["type"].endswith("COMPLETE"):
            plain.take(group)
            group = []
    plain.take(group)
    assert plain.text == sample.token_ids.tolist()
    assert plain.opened == plain.closed == len(sample.block_length)
    assert sum(sample.block_length) == len(sample.token_ids) <= 14
    assert sample.finished == (sample.token_ids[-1] == 0)
    assert 0 not in sample.token_ids[:-1]
    for cut in np.linspace(1, len(events), 7, dtype=int):
        part = fold(events.slice(0, int(cut)), header, where="log")[0]
        assert (
            part.token_ids[: len(part.token_ids) - len(part.unwritten)]
            == plain.text[: len(part.token_ids) - len(part.unwritten)]
        )


# --- what a fold refuses -------------------------------------------------------------------------


OPENED = [("OPEN", {"length": 3}), *(("INSERT", {"uid": u, "left": u - 1}) for u in (1, 2, 3))]
FILLED = [*OPENED, "step", *(("FILL", {"uid": u, "old": V, "new": 9}) for u in (1, 2, 3))]
LOCKED = [*FILLED, *(("COMMIT", {"uid": u, "new": 9}) for u in (1, 2, 3))]


@pytest.mark.parametrize(
    ("story", "message"),
    [
        ([*FILLED, "step", ("FILL", {"uid": 2, "old": 9, "new": 8})], "writes uid 2, which holds"),
        ([*OPENED, "step", ("SUBSTITUTE", {"uid": 2, "old": V, "new": 8})], "writes uid 2"),
        ([*FILLED, ("SUBSTITUTE", {"uid": 2, "old": 9, "new": 8})], "second time, or out of"),
        ([*LOCKED, "step", ("SUBSTITUTE", {"uid": 2, "old": 9, "new": 8})], "which is locked"),
        ([*LOCKED, "step", ("DELETE", {"uid": 2, "old": 9})], "which is locked"),
        ([*FILLED, "step", ("DELETE", {"uid": 2, "old": 8})], "deletes 8 at uid 2"),
        ([*FILLED, ("DELETE", {"uid": 2, "old": 9})], "after a later operation"),
        ([*FILLED, "step", ("INSERT", {"uid": 3, "left": 2})], "adds uid 3"),
        ([*FILLED, "step", ("INSERT", {"uid": 4, "left": 7})], "behind uid 7, no slot"),
        (
            [*FILLED, "step", ("DELETE", {"uid": 2, "old": 9}), ("INSERT", {"uid": 4, "left": 1})],
            "behind uid 1, where it may not",
        ),
        (
            [*FILLED, "step", *(("INSERT", {"uid": u, "left": u - 3}) for u in (4, 5))],
            "behind uid 2, where it may not",
        ),
        ([*LOCKED, "step", ("INSERT", {"uid": 4, "left": 1})], "behind uid 1, where it may not"),
        ([*OPENED, "step", ("COMMIT", {"uid": 2, "new": V})], "commits"),
        ([*FILLED, "step", ("COMPLETE", {"length": 3})], "not committed"),
        ([*LOCKED, "step", ("REOPEN", {"length": 3})], "not just closed"),
        ([*LOCKED, ("COMPLETE", {"length": 3}), ("REOPEN", {"length": 2})], "reopens 2 slots"),
        ([*LOCKED, ("COMPLETE", {"length": 3}), ("COMPLETE", {"length": 3})], "delivers 3 of 0"),
    ],
)
def test_a_fold_refuses_what_breaks_the_rules(story: list[Any], message: str) -> None:
    """Even where a forger has made every hash anew."""
    state = Folded(mask_id=V)
    state.apply(CODE["PROMPT"], 0, -1, -1, 5, -1)

    def tell(event: tuple[str, dict[str, int]]) -> None:
        kind, fields = event
        new = fields.get("new", V if kind == "INSERT" else -1)
        uid, left, old = (fields.get(name, -1) for name in ("uid", "left", "old"))
        state.apply(CODE[kind], uid, left, old, new, fields.get("length", -1))

    for event in story[:-1]:
        state.begin() if event == "step" else tell(event)
    with pytest.raises(RuleError, match=message):
        tell(story[-1])
