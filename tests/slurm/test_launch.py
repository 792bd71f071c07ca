"""Trainings as jobs of a real scheduler: two nodes, eight ranks, and everything that ends a job."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from abf.artifacts import METRICS, read_manifest, read_table
from abf.track.attempts import read_attempts
from tests.slurm.daemons import wait_for
from tests.slurm.jobs import attempts, show, wait_attempts, wait_state
from tests.slurm.micro import LONG, RUN, SITE, Study


@pytest.fixture
def study(prepared: Study, tmp_path: Path) -> Study:
    """A copy of one's own."""
    shutil.copytree(prepared.folder, tmp_path / "study", copy_function=shutil.copy2)
    return Study(tmp_path / "study", prepared.box)


@pytest.fixture(scope="session")
def uninterrupted(prepared: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, float]:
    """The long training's curve when nothing happens to it."""
    folder = tmp_path_factory.mktemp("whole") / "study"
    shutil.copytree(prepared.folder, folder, copy_function=shutil.copy2)
    study = Study(folder, prepared.box)
    directory = study.plan(LONG)
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    return curve(directory)


def curve(directory: Path) -> dict[tuple, float]:
    """Every metric of every step, but those of the clock."""
    rows = read_table(directory / "metrics.parquet", METRICS).to_pylist()
    return {
        (row["step"], row["name"]): row["value"]
        for row in rows
        if not row["name"].endswith(("_per_s", "seconds"))
    }


def job_id(directory: Path) -> str | None:
    path = directory / "job.json"
    return json.loads(path.read_text())["job_id"] if path.exists() else None


def at_work(directory: Path) -> str:
    """Wait until the job has written a checkpoint; its id."""
    wait_for("a checkpoint", lambda: list(directory.glob("ckpt/step-*")), seconds=90, every=0.1)
    found = job_id(directory)
    assert found is not None
    return found


def submitted(directory: Path) -> str:
    """Wait until the job has an id."""
    wait_for("an id", lambda: job_id(directory) is not None, seconds=30, every=0.05)
    return str(job_id(directory))


def left_alone(study: Study, directory: Path, when: Callable[[Path], str]) -> str:
    """Kill the waiting process at that moment; the id of the job it leaves."""
    waiting = study.start(directory)
    job = when(directory)
    os.killpg(waiting.pid, signal.SIGKILL)
    waiting.communicate()
    return job


def states(directory: Path) -> list[str]:
    return [a["state"] for a in read_attempts(directory) if a["state"] != "RUNNING"]


def test_two_nodes_eight_ranks(study: Study) -> None:
    directory = study.plan(RUN)
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert "submitted as job" in done.stdout
    manifest = read_manifest(directory, "train")
    assert manifest["counts"]["steps"] == 5
    (row,) = wait_attempts(study.box, str(job_id(directory)), "COMPLETED")
    assert "node=2" in row["AllocTRES"]
    assert "billing=64" in row["AllocTRES"]
    again = study.run(directory)
    assert again.returncode == 0
    assert "submitted" not in again.stdout


def test_the_warning_before_the_time_limit_requeues_and_nothing_is_lost(
    study: Study, uninterrupted: dict[tuple, float]
) -> None:
    directory = study.plan(LONG)
    waiting = study.start(directory)
    job = at_work(directory)
    # What Slurm sends `signal_seconds` before the end.
    study.box.run("scancel", "--signal=USR2", job)
    output, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, output
    assert job_id(directory) == job
    rows = wait_attempts(study.box, job, "REQUEUED", "COMPLETED")
    assert len(rows) == 2
    assert states(directory) == ["INTERRUPTED", "COMPLETED"]
    assert curve(directory) == uninterrupted


def test_a_killed_waiter_leaves_the_job_and_the_next_one_attaches(
    study: Study, uninterrupted: dict[tuple, float]
) -> None:
    directory = study.plan(LONG)
    job = left_alone(study, directory, at_work)
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert f"attached to job {job}" in done.stdout
    assert "submitted as" not in done.stdout
    assert [row["State"] for row in wait_attempts(study.box, job, "COMPLETED")] == ["COMPLETED"]
    assert curve(directory) == uninterrupted


def test_an_id_that_was_never_written_down_is_found_by_its_name(study: Study) -> None:
    directory = study.plan(LONG)
    job = left_alone(study, directory, at_work)
    record = json.loads((directory / "job.json").read_text())
    (directory / "job.json").write_text(json.dumps(record | {"job_id": None}))
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert f"attached to job {job}" in done.stdout


def test_what_finished_unseen_is_only_declared(study: Study) -> None:
    directory = study.plan(RUN)
    job = left_alone(study, directory, submitted)
    wait_attempts(study.box, job, "COMPLETED", seconds=60)
    assert not (directory / "manifest.json").exists()
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert "attached" not in done.stdout
    assert "submitted" not in done.stdout
    read_manifest(directory, "train")


def test_scancel_by_hand_stops_and_the_same_command_goes_on(
    study: Study, uninterrupted: dict[tuple, float]
) -> None:
    directory = study.plan(LONG)
    waiting = study.start(directory)
    job = at_work(directory)
    study.box.run("scancel", job)
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 8, output
    assert f"job {job} ended as CANCELLED: somebody cancelled it" in output
    assert len(attempts(study.box, job)) == 1
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert job_id(directory) != job
    assert curve(directory) == uninterrupted


def test_a_dead_node_costs_one_checkpoint_interval(
    study: Study, uninterrupted: dict[tuple, float]
) -> None:
    directory = study.plan(LONG)
    waiting = study.start(directory)
    job = at_work(directory)
    node = show(study.box, job)["BatchHost"]
    study.box.kill_node(node)
    try:
        wait_state(study.box, job, "NODE_FAIL", "PENDING", "COMPLETING", seconds=90)
    finally:
        study.box.start_node(node)
    output, _ = waiting.communicate(timeout=180)
    assert waiting.returncode == 0, output
    assert curve(directory) == uninterrupted


def test_an_id_nobody_knows_is_waited_for_only_so_long(study: Study) -> None:
    directory = study.plan(RUN)
    (directory / "job.json").write_text(
        json.dumps({"job_id": "999999", "name": "gone", "submissions": 1})
    )
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert "job 999999 ended as UNKNOWN" in done.stdout
    assert "submitted as job" in done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("account: euhpc_test", "account: nobodys"), "Invalid account"),
        (("poll_seconds: 1", "poll_seconds: 1\nqos: nosuch"), "Invalid qos"),
        (("poll_seconds: 1", "poll_seconds: 1\npartition: nosuch"), "invalid partition"),
    ],
)
def test_a_refused_submission_is_one_message(
    study: Study, change: tuple[str, str], message: str
) -> None:
    directory = study.plan(RUN)
    (study.folder / "site.yaml").write_text(SITE.replace(*change))
    done = study.run(directory)
    assert done.returncode == 8
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert "abf doctor" in done.stdout


def test_two_waiters(study: Study) -> None:
    directory = study.plan(RUN)
    first = study.start(directory)
    wait_for("the lock", lambda: "abf train" in _lock_text(directory), seconds=30, every=0.05)
    second = study.run(directory)
    assert second.returncode == 6
    assert f"process {first.pid} on" in second.stdout
    first.communicate(timeout=60)
    assert first.returncode == 0


def _lock_text(directory: Path) -> str:
    path = directory / ".job" / ".lock"
    return path.read_text() if path.exists() else ""
