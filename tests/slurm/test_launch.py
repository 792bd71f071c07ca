"""Trainings as jobs of a real scheduler: two nodes, eight ranks, and everything that ends a job."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from abf.artifacts import read_manifest
from tests.slurm.daemons import wait_for
from tests.slurm.jobs import attempts, show, wait_attempts, wait_state
from tests.slurm.micro import LONG, RUN, SITE, Study
from tests.slurm.reliability import Report, recovered
from tests.slurm.training import at_work, curve, job_id, left_alone, submitted


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


def test_a_killed_waiter_leaves_the_job_and_the_next_one_attaches(
    study: Study, uninterrupted: dict[tuple, float], books: Callable, report: Report
) -> None:
    directory = study.plan(LONG)
    job = left_alone(study, directory, at_work)
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert f"attached to job {job}" in done.stdout
    assert "submitted as" not in done.stdout
    report("the waiting rule killed", "the job went on; the next one attached to it", 0.0)
    (row,) = books(directory)
    assert (row["JobIDRaw"], row["State"]) == (job, "COMPLETED")
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
    study: Study, uninterrupted: dict[tuple, float], books: Callable, report: Report
) -> None:
    directory = study.plan(LONG)
    waiting = study.start(directory)
    job = at_work(directory)
    study.box.run("scancel", job)
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 8, output
    assert f"job {job} ended as CANCELLED: somebody cancelled it" in output
    assert len(attempts(study.box, job)) == 1
    began = time.time()
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    report("`scancel` by hand", "stopped and said so; the same command went on",
           recovered(directory, began))  # fmt: skip
    assert job_id(directory) != job
    assert curve(directory) == uninterrupted
    assert [row["State"].split()[0] for row in books(directory)] == ["CANCELLED", "COMPLETED"]


def test_a_dead_node_costs_one_checkpoint_interval(
    study: Study, uninterrupted: dict[tuple, float], books: Callable, report: Report
) -> None:
    directory = study.plan(LONG)
    waiting = study.start(directory)
    job = at_work(directory)
    node = show(study.box, job)["BatchHost"]
    began = time.time()
    study.box.kill_node(node)
    try:
        # Not while it is still ending: a node that is back too early may get what ends the job's
        # first run while its second runs there, under the same number.
        wait_state(study.box, job, "NODE_FAIL", "PENDING", seconds=150)
    finally:
        study.box.start_node(node)
    report("a node dies during a two-node training", "queued again by Slurm once it noticed",
           recovered(directory, began), "the steps since the last checkpoint")  # fmt: skip
    output, _ = waiting.communicate(timeout=180)
    assert waiting.returncode == 0, output
    assert curve(directory) == uninterrupted
    rows = books(directory)
    assert [(row["JobIDRaw"], row["State"]) for row in rows] == [
        (job, "NODE_FAIL"), (job, "COMPLETED"),
    ]  # fmt: skip


def test_an_id_nobody_knows_is_waited_for_only_so_long(
    study: Study, books: Callable, report: Report
) -> None:
    directory = study.plan(RUN)
    (directory / "job.json").write_text(
        json.dumps({"job_id": "999999", "name": "gone", "submissions": 1})
    )
    began = time.time()
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    report("the scheduler has forgotten the id", "waited 5 s (site file), submitted once more",
           recovered(directory, began))  # fmt: skip
    assert "job 999999 ended as UNKNOWN" in done.stdout
    assert "submitted as job" in done.stdout
    (row,) = books(directory)
    assert row["JobIDRaw"] == job_id(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("account: euhpc_test", "account: nobodys"), "Invalid account"),
        (("poll_seconds: 1", "poll_seconds: 1\nqos: nosuch"), "Invalid qos"),
        (("poll_seconds: 1", "poll_seconds: 1\npartition: nosuch"), "invalid partition"),
    ],
)
def test_a_refused_submission_is_one_message(
    study: Study, change: tuple[str, str], message: str, books: Callable
) -> None:
    directory = study.plan(RUN)
    (study.folder / "site.yaml").write_text(SITE.replace(*change))
    done = study.run(directory)
    assert done.returncode == 8
    assert message in done.stdout
    assert "Traceback" not in done.stdout
    assert "abf doctor" in done.stdout
    assert books(directory) == []


def test_two_waiters(study: Study) -> None:
    directory = study.plan(RUN)
    first = study.start(directory)
    wait_for("the lock", lambda: "abf train" in _lock_text(directory), seconds=30, every=0.05)
    second = study.run(directory)
    assert second.returncode == 0, second.stdout
    assert f"waited for by abf train --submit, process {first.pid} on" in second.stdout
    assert "submitted" not in second.stdout
    first.communicate(timeout=60)
    assert first.returncode == 0
    assert len(attempts(study.box, str(job_id(directory)))) == 1


def _lock_text(directory: Path) -> str:
    path = directory / ".job" / ".lock"
    return path.read_text() if path.exists() else ""
