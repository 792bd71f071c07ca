"""One screen about a results folder: empty, unfinished, at work, failed, killed, finished."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from abf.drive import Drive
from abf.errors import ArtifactError, ConfigError
from abf.files import lock
from abf.grid import load_study
from abf.ledger.budget import figure
from abf.plan import Plan
from abf.seeing.at_work import lock_holder
from abf.seeing.hours import Hours, hours_to_come
from abf.seeing.look import Status, look
from abf.seeing.planned import Planned, read_planned
from abf.stage import stage
from abf.stages import ENDS, MANIFEST, STAGES
from abf.status import Page, duration, hours, render, show_status
from abf.study import serve_ui
from abf.track.attempts import ATTEMPTS
from abf.track.journal import Journal
from abf.track.pace import read_pace
from tests.test_why import finish, write

RESULTS = Path("results")


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """A written plan of two cells with nothing done."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", "/nowhere")  # a machine without Slurm
    (tmp_path / "text.jsonl").write_text("{}")
    found = Plan(load_study(write(Path())), RESULTS)
    found.write()
    return found


def status() -> Status:
    return look(read_planned(RESULTS, None))


def screen(*, width: int | None = None, rows: int | None = None, colour: bool = False) -> str:
    return "\n".join(render(status(), Page(width, colour=colour), rows=rows))


def test_a_folder_without_a_study(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    show_status(tmp_path / "none", None)
    assert "none holds no study yet: `abf plan STUDY.yaml`" in capsys.readouterr().out


def test_a_study_that_was_only_planned(plan: Plan, capsys: pytest.CaptureFixture[str]) -> None:
    said = screen()
    assert said.startswith("grid: 2 cells, grid.yaml\n")
    assert f"0 of {len(plan.instances)} stage directories done in results" in said
    assert "driver   none at work" in said
    assert "spent    0 core-hours in 0 attempts" in said
    assert "to come  no measurement yet: fetch, prepare, tokenizer" in said
    assert "trouble" not in said
    assert "\nfailed   " not in said
    show_status(Path("elsewhere"), Path("grid.yaml"))  # planned in memory
    assert "0 of" in capsys.readouterr().out
    assert not Path("elsewhere").exists()


def test_states_hours_and_the_last_failure(plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    instances = list(plan.instances.values())
    first = [
        i for i in instances if i.stage not in ("decode", "score", *("ledger", "report", "mlflow"))
    ]
    for instance in first[:-1]:
        finish(instance, RESULTS)
    failing = first[-1]
    assert failing.stage == "train"
    directory = failing.directory(RESULTS)
    with (
        pytest.raises(ValueError, match="seven"),
        stage("train", directory, inputs={}, config=None),
    ):
        raise ValueError("seven is no learning rate")
    log = RESULTS / "logs" / f"{failing.place}.log"
    log.parent.mkdir(parents=True)
    log.write_text("".join(f"line {n}\n" for n in range(40)) + "\nValueError: seven\n")
    found = status()
    assert found.states[failing.place] == "failed"
    assert [found.count("train", s) for s in ("done", "failed", "to do")] == [1, 1, 0]
    assert found.count("score", "to do") == 2
    assert found.attempts == len(first)
    rows = [json.loads(line) for d in first for line in
            (d.directory(RESULTS) / ATTEMPTS).read_text().splitlines()]  # fmt: skip
    spent = sum(r["cores"] * r["elapsed_s"] / 3600 for r in rows if r["state"] != "RUNNING")
    assert found.spent.core == pytest.approx(spent)
    assert found.spent.node == 0
    # One training is to be done, and one was measured.
    done = next(i for i in first if i.stage == "train" and i is not failing)
    (seconds,) = [r["elapsed_s"] for r in rows if r["run"] == done.key and r["rule"] == "train"
                  and r["state"] == "COMPLETED"]  # fmt: skip
    assert found.to_come["train"].core == pytest.approx(seconds / 3600)
    assert found.unmeasured == ["decode", "score", "ledger", "report", "mlflow"]
    said = screen()
    assert f"failed   {failing.place}, 0 s ago (1 failed in all)" in said
    assert "ValueError: seven is no learning rate" in said
    assert f"the end of {log}:" in said
    assert said.endswith("| line 39\n         | ValueError: seven")
    assert "line 30" not in said

    # Made with another version: outdated is a column of its own.
    monkeypatch.setitem(STAGES, "pack", replace(STAGES["pack"], version=9))
    assert status().count("pack", "outdated") == 3
    assert "outdated" in screen()


def test_work_that_nobody_declared_is_done(plan: Plan) -> None:
    fetch = next(iter(plan.instances.values()))
    (finish(fetch, RESULTS) / MANIFEST).unlink()
    assert status().states[fetch.place] == "done"
    assert "1 of the done are not declared yet" in screen()


def test_running_and_killed(plan: Plan) -> None:
    train = plan.cells[0].train
    code = (
        "import sys, time, pathlib\nfrom abf.stage import stage\n"
        "with stage('train', pathlib.Path(sys.argv[1]), inputs={}, config=None) as run:\n"
        "    print('working', flush=True); time.sleep(600)\n"
    )
    with Journal(RESULTS / train.place / "journal.jsonl") as journal:
        journal.event("start", step=0, steps=400)
        for step in (10, 20, 30):
            journal.metrics(step, step * 512, {"tokens_per_s": 1234.0}, wall_s=step * 2.0)
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(RESULTS / train.place)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "working\n"
        said = screen()
        assert f"{train.place}  process {process.pid} on " in said
        assert "step 30/400 (8 %), 12 min left, 1,234 tokens/s" in said
    finally:
        process.kill()
        process.wait()
    found = status()
    assert found.states[train.place] == "failed"
    assert found.failure is not None
    assert "killed or power lost" in found.failure.reason
    assert "it left no log" in screen()


def test_an_interrupt_is_to_do(plan: Plan) -> None:
    train = plan.cells[0].train.place
    with pytest.raises(KeyboardInterrupt), stage("train", RESULTS / train, inputs={}, config=None):
        raise KeyboardInterrupt
    assert status().states[train] == "to do"


def test_what_a_job_left_behind(plan: Plan) -> None:
    """Without the scheduler's commands: its last word in job.json, and what the waiters knew."""
    first, second = (cell.train.place for cell in plan.cells)
    record = {"job_id": "12", "name": "abf-train", "submissions": 1}
    (RESULTS / first / "job.json").write_text(json.dumps(record | {"ended": "OUT_OF_MEMORY"}))
    (RESULTS / first / ".job").mkdir()
    (RESULTS / first / ".job" / "12_0_log.err").write_text("slurmstepd: oom\n")
    (RESULTS / second / "job.json").write_text(json.dumps(record | {"job_id": "13"}))
    (RESULTS / ".driver").mkdir()
    known = {"state": "PENDING", "reason": "Resources", "time_left": "", "unknown_since": None}
    jobs = RESULTS / ".driver" / "jobs.json"
    jobs.write_text(json.dumps({"jobs": {"13": known}, "trouble": ""}))
    found = status()
    assert (found.states[first], found.states[second]) == ("failed", "waiting")
    said = screen()
    assert f"{second}  job 13 PENDING, Resources" in said
    assert "job 12 ended as OUT_OF_MEMORY" in said
    assert "| slurmstepd: oom" in said
    assert "job states are 0 s old" in said
    os.utime(jobs, (0, 0))  # a snapshot of long ago is none
    assert status().states[second] == "to do"
    (RESULTS / first / "job.json").write_text(json.dumps(record | {"job_id": None}))
    assert "whoever asked the scheduler for a job died before it answered" in screen()
    refused = record | {"job_id": None, "refused": "Invalid account"}
    (RESULTS / first / "job.json").write_text(json.dumps(refused))
    assert "the scheduler refused the job: Invalid account" in screen()


def test_the_driver(plan: Plan) -> None:
    code = (
        "import sys, time, pathlib\nfrom abf.driver import claim\n"
        "claim(pathlib.Path('results'), 'grid.yaml')\nprint('held', flush=True); time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        assert f"driver   snakemake on grid.yaml, process {holder.pid} on " in screen()
    finally:
        holder.kill()
        holder.wait()
    assert "driver   none at work; the last was snakemake on grid.yaml, process" in screen()
    record = {"job_id": "7", "study": "grid.yaml", "state": "finished", "command": ["true"]}
    (RESULTS / ".driver" / "drive.json").write_text(json.dumps(record))
    assert "driver   none at work; job 7 on grid.yaml: finished" in screen()


def test_a_lock_is_looked_at_without_taking_it(tmp_path: Path) -> None:
    assert lock_holder(tmp_path / ".lock") is None
    with lock(tmp_path, "abf train"):
        holder = lock_holder(tmp_path / ".lock")
        assert holder is not None
        assert holder.alive
        text = holder.text
    assert lock_holder(tmp_path / ".lock") is None
    (tmp_path / ".lock").write_text(text.replace(" on ", " on another-"))
    assert lock_holder(tmp_path / ".lock").alive is None  # type: ignore[union-attr]
    # The same number, but of a process that began after the lock was taken.
    year = time.strftime("%Y")
    (tmp_path / ".lock").write_text(text.replace(f"since {year}", "since 2001"))
    assert lock_holder(tmp_path / ".lock").alive is False  # type: ignore[union-attr]


def test_core_hours_to_come_are_the_mean_less_what_was_spent() -> None:
    states = {
        f"train/{n}": s for n, s in zip("abcd", ["done", "done", "running", "to do"], strict=True)
    }
    spent = {"train/a": Hours(1), "train/b": Hours(3), "train/c": Hours(0.5)}
    planned = Planned(Path("nowhere"), (), None)
    assert hours_to_come(planned, states, spent) == ({"train": Hours(2 + 1.5)}, [])


def test_node_hours_to_come_are_the_forecasts(plan: Plan) -> None:
    first, second = plan.cells
    left = [second.train, *second.decodes.values(), second.score]
    for instance in plan.instances.values():
        if instance.stage not in ENDS and instance not in left:
            finish(instance, RESULTS)
    states = {first.score.place: "done", second.score.place: "to do", second.train.place: "to do"}
    spent = {first.score.place: Hours(node=10)}
    to_come, unmeasured = hours_to_come(read_planned(RESULTS, None), states, spent)
    assert unmeasured == ["train"]
    assert list(to_come) == ["score"]
    assert to_come["score"].core == 0
    # One measurement, one directory like it: the median is the measurement.
    assert to_come["score"].node == pytest.approx(10)


def test_a_checkpoint_that_goes_while_the_folder_is_read(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A training at work removes its older checkpoints."""
    checkpoint = RESULTS / plan.cells[0].train.place / "ckpt" / "step-00000048"
    checkpoint.mkdir(parents=True)
    scan, gone = os.scandir, []

    def scandir(path: str | Path = ".") -> object:
        if Path(path) == checkpoint:
            checkpoint.rmdir()
            gone.append(path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", scandir)
    status()
    assert len(gone) == 1


def test_pace_over_a_resume_and_a_torn_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    assert read_pace(path) is None
    with Journal(path) as journal:
        journal.event("start", step=0, steps=100)
        first = read_pace(path)
        assert first is not None
        assert (first.step, first.steps, first.left_s, first.tokens_per_s) == (0, 100, None, None)
        journal.metrics(10, 1, {"tokens_per_s": 5.0}, wall_s=50.0)
        alone = read_pace(path)
        assert alone is not None
        assert alone.left_s == pytest.approx(90 * 5.0)
        for step in range(11, 61):
            journal.metrics(step, 1, {"tokens_per_s": 7.0}, wall_s=40.0 + step)
        journal.cut(50)
        journal.event("resume", step=50, steps=100)
        journal.event("checkpoint", step=50, path='odd "name":"start" text')
    with open(path, "ab") as handle:
        handle.write(b'{"kind":"metrics","st')
    pace = read_pace(path, now=time.time() + 500)
    assert pace is not None
    assert (pace.step, pace.tokens_per_s) == (50, 7.0)
    assert pace.left_s == pytest.approx(50.0)
    assert pace.silent_s == pytest.approx(500, abs=20)


def test_lines_fit_the_terminal_and_colours_are_for_terminals(plan: Plan) -> None:
    for instance in list(plan.instances.values())[:3]:
        finish(instance, RESULTS)
    narrow = screen(width=40)
    assert max(map(len, narrow.splitlines())) <= 40
    assert "\033" not in narrow
    assert "\033[32m" in screen(width=80, colour=True)


def test_many_jobs_fit_one_screen(plan: Plan) -> None:
    (RESULTS / ".driver").mkdir()
    known = {"state": "PENDING", "reason": "", "time_left": "", "unknown_since": None}
    places = [i.place for i in plan.instances.values()]
    for number, place in enumerate(places):
        (RESULTS / place / "job.json").write_text(json.dumps({"job_id": str(number)}))
    jobs = {str(number): known for number in range(len(places))}
    (RESULTS / ".driver" / "jobs.json").write_text(json.dumps({"jobs": jobs, "trouble": ""}))
    lines = screen(rows=30).splitlines()
    assert len(lines) <= 30
    assert any(
        line.startswith("and ") and line.endswith("more at work or waiting") for line in lines
    )
    assert len(screen().splitlines()) > 30


def test_figures_in_words() -> None:
    assert [duration(s) for s in (4, 600, 20_000, 200_000)] == [
        "4 s",
        "10 min",
        "5.6 h",
        "2.3 days",
    ]
    assert hours(Hours(0.5, 1234)) == "0.50 core-hours and 1,234.00 node-hours"
    assert [figure(h) for h in (0, 0.00001, 0.00278123, 0.0278, 0.0999, 0.3, -12.345, 90_000)] == [
        *("0.00", "0.00", "0.00278", "0.0278", "0.10", "0.30", "-12.35", "90,000.00")
    ]


def test_a_damaged_plan_is_named(plan: Plan) -> None:
    plan.path.write_text("{bad")
    with pytest.raises(ArtifactError, match=f"{plan.path} is damaged .*`abf plan STUDY.yaml`"):
        read_planned(RESULTS, None)


def test_a_driver_that_ended_without_a_word_is_not_said_to_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = {"job_id": "7", "study": "grid.yaml", "state": "running", "command": []}
    drive = Drive(tmp_path)
    drive.folder.mkdir()
    (drive.folder / "drive.json").write_text(json.dumps(record))
    monkeypatch.setattr(drive, "job", lambda: None)
    assert "running when last heard of, and gone: `abf drive start`" in drive.status()


def test_a_port_that_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="port 99999 does not exist"):
        serve_ui(tmp_path, 99999)
