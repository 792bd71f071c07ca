"""What `abf status` and `abf why` call things: arms, causes, jobs that never began, reasons."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abf.errors import DivergenceError
from abf.files import write_json
from abf.grid import load_study
from abf.plan import Plan
from abf.seeing.look import look
from abf.seeing.planned import read_planned, slug
from abf.stage import stage
from abf.status import Page, render
from abf.why import Why
from tests.test_why import GRID, finish, write

RESULTS = Path("results")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A written plan of three cells, the last two of one segmenter; the first two are finished."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")  # a machine without Slurm
    (tmp_path / "text.jsonl").write_text("{}")
    before = Plan(load_study(write(Path())), RESULTS)
    before.write()
    for instance in before.instances.values():
        finish(instance, RESULTS)
    write(Path(), GRID + "  fast: {train.optim.lr: 0.2}\n")
    found = Plan(load_study(Path("grid.yaml")), RESULTS)
    found.write()
    return found


def screen(width: int | None = None) -> str:
    return "\n".join(render(look(read_planned(RESULTS, None)), Page(width, colour=False)))


def why() -> Why:
    return Why(read_planned(RESULTS, Path("grid.yaml")))


def test_one_line_a_cause(plan: Plan) -> None:
    write(Path(), GRID + "  fast: {train.optim.lr: 0.2}\n  slow: {train.optim.lr: 0.3}\n")
    found = why()
    cells = {cell["name"]: cell for cell in found.planned.plans[0]["cells"]}
    done, fast, slow = (cells[f"{arm}-s0"]["train"] for arm in ("sentence", "fast", "slow"))
    # Two arms of one segmenter: their keys differ in the hash, their names in the cell.
    assert fast.startswith("train/sentence-s0-")
    assert found.answer(found.find("train"))[-3:] == [
        f"{fast} (fast-s0), {slow} (slow-s0) will run",
        "  never run",
        "(name one alone to see the nearest finished one and the keys that differ)",
    ]
    assert found.answer(found.find("report"))[1] == (
        f"  because of {fast} (fast-s0), {slow} (slow-s0): never run"
    )
    # A cell has one beginning: its keys are told once.
    decode, score = cells["fast-s0"]["decodes"]["go.a"], cells["fast-s0"]["score"]
    assert found.answer(found.find("fast-s0")) == [
        f"{fast} (fast-s0) will run",
        "  never run",
        f"  nearest finished one: {done}, with other keys (there -> here)",
        "    train.optim.lr: 0.1 -> 0.2",
        f"{decode} (fast-s0), {score} will run",
        f"  because of {fast} (fast-s0): never run",
    ]


def test_a_job_that_never_began_is_named(plan: Plan) -> None:
    place = plan.cells[2].train.place
    train = RESULTS / place
    job = {"job_id": "12", "name": "x", "submissions": 1}
    for change, said in (
        ({}, "submitted as job 12, which has not begun"),
        ({"ended": "CANCELLED", "why": "somebody cancelled it before it began"},
         "job 12 ended as CANCELLED: somebody cancelled it before it began"),
        ({"ended": "TIMEOUT", "why": "", "over_budget": "it does not fit the cap"},
         "refused: it does not fit the cap"),
        ({"job_id": None}, "whoever asked the scheduler for a job died before it answered"),
        ({"job_id": None, "refused": "Invalid qos"}, "the scheduler refused the job: Invalid qos"),
    ):  # fmt: skip
        write_json(train / "job.json", job | change)
        assert why().explain(place)[1] == f"  {said}"
    # What happened here since then says more than the job does.
    with pytest.raises(ZeroDivisionError), stage("train", train, inputs={}, config=None):
        _ = 1 / 0
    assert "attempt 1 was FAILED: ZeroDivisionError" in why().explain(place)[1]


def test_arms_that_differ_in_training_alone_are_told_apart(plan: Plan) -> None:
    (RESULTS / ".driver").mkdir()
    known = {"state": "PENDING", "reason": "", "time_left": "", "unknown_since": None}
    trains = [cell.train.place for cell in plan.cells]
    for number, place in enumerate(trains):
        (RESULTS / place / "job.json").write_text(json.dumps({"job_id": str(number)}))
    jobs = {str(number): known for number in range(len(trains))}
    (RESULTS / ".driver" / "jobs.json").write_text(json.dumps({"jobs": jobs, "trouble": ""}))
    assert [slug(place) for place in trains[1:]] == ["train/sentence-s0", "train/sentence-s0"]
    names = {line.partition("  ")[0] for line in screen().splitlines() if " PENDING" in line}
    assert names == {trains[0], trains[1], f"{trains[2]} (fast-s0)"}


def test_a_long_reason_is_shown_whole(plan: Plan) -> None:
    train = plan.cells[2].train.place
    reason = f"step 5: loss nan. Batch: {', '.join(map(str, range(300)))}. Lower train.optim.lr"
    with (
        pytest.raises(DivergenceError),
        stage("train", RESULTS / train, inputs={}, config=None),
    ):
        raise DivergenceError(reason)
    assert reason in screen()
    narrow = screen(width=60)
    assert reason in " ".join(line.strip() for line in narrow.splitlines())
    assert max(map(len, narrow.splitlines())) <= 60
    with (
        pytest.raises(ValueError, match="x"),
        stage("train", RESULTS / train, inputs={}, config=None),
    ):
        raise ValueError("x" * 2000)
    assert f"         ValueError: {'x' * 487}…" in screen()
