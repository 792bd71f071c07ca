"""What `abf status` and `abf why` say of jobs in a real queue: waiting, running, cancelled."""

from __future__ import annotations

import subprocess
import sys

from abf.cluster.jobs import tag
from abf.ledger.budget import figure
from tests.slurm.daemons import wait_for
from tests.slurm.jobs import submit, wait_attempts, wait_state
from tests.slurm.micro import LONG, Study
from tests.slurm.training import at_work, job_id


def abf(study: Study, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "abf.cli", *arguments],
        cwd=study.folder, env=study.env, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def core_hours(said: str) -> str:
    """What the screen says was spent without a scheduler."""
    return said.partition("\nspent    ")[2].partition(" core-hours")[0]


def test_status_sees_the_queue(study: Study) -> None:
    directory = study.plan(LONG)
    place = f"train/{directory.name}"
    # Four nodes full of other work: the training waits, and so does a rule's job.
    filler = submit(study.box, "sleep 600", "--nodes=4", "--exclusive", "--mem=0")
    wait_state(study.box, filler, "RUNNING")
    waiting = study.start(directory)
    wait_for("a job", lambda: job_id(directory) is not None, seconds=30, every=0.1)
    score = next((study.folder / "results/score").iterdir()).name
    rule = submit(
        study.box, "sleep 1", f"--job-name={tag(study.folder / 'results')}_0000",
        f"--comment=rule_score_wildcards_{score}",
    )  # fmt: skip
    job = job_id(directory)
    said = abf(study, "status")
    assert f"{place}  job {job} PENDING" in said
    assert f"job {rule} PENDING" in said
    assert "no measurement yet: train" in said
    before = core_hours(said)

    study.box.run("scancel", filler, rule)
    at_work(directory)
    wait_for("a record", lambda: '"metrics"' in (directory / "journal.jsonl").read_text(),
             seconds=30, every=0.2)  # fmt: skip
    said = abf(study, "status")
    assert f"{place}  job {job} RUNNING" in said
    assert "RUNNING, None" not in said
    assert core_hours(said) == before  # its hours are the scheduler's to tell
    assert " left, " in said
    assert " tokens/s, time limit in " in said
    assert f"{place} is at work: attempt 1" in abf(study, "why", "train", "run.yaml")

    study.box.run("scancel", str(job))
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 8, output
    (row,) = wait_attempts(study.box, str(job), "CANCELLED")
    said = abf(study, "status")
    # Two full nodes; the ledger's rule, from the scheduler's own seconds.
    assert f" and {figure(int(row['ElapsedRaw']) / 3600 * 2)} node-hours in " in said
    assert f"failed   {place}" in said
    assert f"job {job} ended as CANCELLED" in said
    assert "_0_log.err:" in said
    assert "it goes on from step-" in abf(study, "why", place)
