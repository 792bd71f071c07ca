"""How trainings and those who submit them end on a real scheduler, and what is said of it."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.slurm.daemons import wait_for
from tests.slurm.jobs import submit, wait_state
from tests.slurm.micro import LONG, RUN, SITE, Study
from tests.slurm.reliability import Report
from tests.slurm.test_faults import ranks
from tests.slurm.test_status import abf
from tests.slurm.training import at_work, curve, job_id

SBATCH = """#!/bin/sh
echo call >> {folder}/calls
if [ -e {folder}/deadly ]; then
    rm {folder}/deadly
    {before}
    {sbatch} "$@" > {folder}/answer
    {after}
else
    exec {sbatch} "$@"
fi
"""
"""Once, it ends who asked: when the job exists, or while the request is still on its way."""
KILL = "kill -9 $PPID"
ON_ITS_WAY = KILL + "\nwhile [ ! -e {folder}/go ]; do sleep 0.05; done"
SQUEUE = """#!/bin/sh
case "$*" in *--name=*) if [ ! -e {folder}/go ]; then touch {folder}/go; exit 0; fi;; esac
exec {squeue} "$@"
"""
"""The first who looks for the job by its name finds none; then the request arrives."""


def install(study: Study, folder: Path, **scripts: str) -> None:
    """Put these scripts before Slurm's own commands."""
    folder.mkdir()
    real = {name: shutil.which(name, path=study.env["PATH"]) for name in scripts}
    for name, text in scripts.items():
        path = folder / name
        path.write_text(
            text.replace("{folder}", str(folder)).replace(f"{{{name}}}", str(real[name]))
        )
        path.chmod(0o755)
    study.env = study.env | {"PATH": f"{folder}:{study.env['PATH']}"}


def test_a_submitter_killed_before_it_reads_the_answer(
    study: Study, uninterrupted: dict[tuple, float], books: Callable, report: Report
) -> None:
    directory, folder = study.plan(LONG), study.folder / "bin"
    install(study, folder, sbatch=SBATCH.replace("{before}", ":").replace("{after}", KILL))
    (folder / "deadly").touch()
    assert study.run(directory).returncode == -signal.SIGKILL
    job = (folder / "answer").read_text().split()[-1]
    assert job_id(directory) is None
    assert not (directory / ".job" / f"{job}_submission.sh").exists()  # submitit came no further
    # Nobody helps it: the job has what it needs.
    wait_for("a checkpoint", lambda: any(directory.glob("ckpt/step-*")), seconds=60, every=0.1)
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert f"attached to job {job}" in done.stdout
    assert (folder / "calls").read_text() == "call\n"
    report("whoever submits a job dies before it has the id",
           "the job ran; the next one found it by its name", 0.0)  # fmt: skip
    assert [(row["JobIDRaw"], row["State"]) for row in books(directory)] == [(job, "COMPLETED")]
    assert curve(directory) == uninterrupted


def test_a_request_that_outlives_who_asked(study: Study, books: Callable) -> None:
    directory, folder = study.plan(RUN), study.folder / "bin"
    (study.folder / "site.yaml").write_text(SITE.replace("poll_seconds: 1", "poll_seconds: 5"))
    sbatch = SBATCH.replace("{before}", ON_ITS_WAY).replace("{after}", ":")
    install(study, folder, sbatch=sbatch, squeue=SQUEUE)
    (folder / "deadly").touch()
    assert study.run(directory).returncode == -signal.SIGKILL
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    job = (folder / "answer").read_text().split()[-1]
    assert f"attached to job {job}" in done.stdout
    assert (folder / "calls").read_text() == "call\n"
    assert [row["JobIDRaw"] for row in books(directory)] == [job]


def test_what_a_killed_submitter_left_is_cleared(study: Study) -> None:
    directory = study.plan(RUN)
    stray = directory / ".job" / f"{'0123456789abcdef' * 2}.pkl"
    stray.parent.mkdir()
    stray.write_bytes(b"")
    (directory / "job.json").write_text('{"job_id": null, "name": "x", "submissions": 1}')
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert "submitted as job" in done.stdout
    job = job_id(directory)
    assert sorted(p.name for p in stray.parent.glob("*.pkl")) == sorted(
        [f"{job}_submitted.pkl", "work.pkl", *(f"{job}_{rank}_result.pkl" for rank in range(8))]
    )


@pytest.mark.parametrize("killed", [0, 1])
def test_a_killed_rank_is_named(study: Study, killed: int, books: Callable) -> None:
    directory = study.plan(LONG)
    waiting = study.start(directory)
    job = at_work(directory)
    (victim,) = [p for p in ranks(study.box, job) if p.environ()["SLURM_PROCID"] == str(killed)]
    host = victim.environ()["SLURMD_NODENAME"]
    victim.kill()
    output, _ = waiting.communicate(timeout=60)
    assert waiting.returncode == 8, output
    assert f"job {job} ended as FAILED: rank {killed} on {host}" in output
    assert ": Killed" in output
    assert "The same command goes on from the checkpoint of step " in output
    why = f"rank {killed} on {host}"
    assert f"job {job} ended as FAILED: {why}" in abf(study, "status")
    assert f"job {job} ended as FAILED: {why}" in abf(study, "why", "train")
    assert [(row["JobIDRaw"], row["State"]) for row in books(directory)] == [(job, "FAILED")]


def test_a_job_cancelled_before_it_began(study: Study, tmp_path: Path, books: Callable) -> None:
    directory = study.plan(LONG)
    elsewhere = f"--chdir={tmp_path}"
    filler = submit(study.box, "sleep 600", "--nodes=4", "--exclusive", "--mem=0", elsewhere)
    wait_state(study.box, filler, "RUNNING")
    waiting = study.start(directory)
    wait_for("a job", lambda: job_id(directory) is not None, seconds=30, every=0.1)
    job = job_id(directory)
    assert f"submitted as job {job}, which has not begun" in abf(study, "why", "train")
    study.box.run("scancel", str(job), filler)
    output, _ = waiting.communicate(timeout=60)
    assert f"job {job} ended as CANCELLED: somebody cancelled it before it began" in output
    assert "The same command begins at step 0" in output
    said = f"job {job} ended as CANCELLED: somebody cancelled it before it began"
    assert f"         {said}\n" in abf(study, "status")
    assert f"  {said}\n" in abf(study, "why", "train")
    (row,) = books(directory)
    assert (row["JobIDRaw"], row["State"].split()[0]) == (job, "CANCELLED")


def test_a_divergence_is_told_to_its_last_word(study: Study) -> None:
    rate = "  log_steps: 1\n  optim: {lr: 1.0e+17}\n"
    directory = study.plan(LONG.replace("  log_steps: 1\n", rate))
    done = study.run(directory)
    assert done.returncode == 8, done.stdout
    said = f"job {job_id(directory)} ended as FAILED: step 2 of 977: loss nan"
    last = "look at that text, or lower train.optim.lr or train.optim.clip_norm"
    assert f"abf train: {said}" in done.stdout
    assert f"{last}. The same command begins at step 0; its log: " in done.stdout
    assert f"         {said}" in abf(study, "status")
    assert f"{last}\n         the end of " in abf(study, "status")
    why = abf(study, "why", "train")
    assert f"  {said}" in why
    assert f"{last}\n" in why
