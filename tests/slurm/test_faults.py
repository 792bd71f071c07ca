"""What a national machine does to a training, done to one: nothing is lost and nothing runs twice.

After each fault: the exact loss curve, and a ledger that equals the scheduler's books.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import psutil
import pytest

from abf.artifacts import read_manifest
from tests.slurm.box import Box
from tests.slurm.daemons import processes, wait_for
from tests.slurm.jobs import submit, wait_attempts, wait_state
from tests.slurm.micro import LONG, SITE, Study, copied
from tests.slurm.reliability import Report, event, recovered
from tests.slurm.test_status import abf
from tests.slurm.training import at_work, curve, job_id, states

PTRACE_ATTACH, WALL = 16, 0x40000000
SUBMIT = "submitit.core._submit"
"""Module that srun starts once for each rank."""


def ranks(box: Box, job: str) -> list[psutil.Process]:
    """The training's own processes on all nodes."""
    found = []
    for pid, _ in processes(box.root):
        try:
            process = psutil.Process(pid)
            if process.environ().get("SLURM_JOB_ID") == job and "SLURM_PROCID" in process.environ():
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return [p for p in found if p.cmdline()[:4] == [sys.executable, "-u", "-m", SUBMIT]]


def recovered_without_restart(directory: Path, since: float) -> float:
    """Seconds from a fault that a training did not notice to its next step."""
    path = directory / "journal.jsonl"
    size = path.stat().st_size
    wait_for("a step after the fault", lambda: path.stat().st_size > size, seconds=60)
    return time.time() - since


def hung(process: psutil.Process) -> None:
    """Hold its main thread, as a file system does that does not answer; Slurm's SIGCONT wakes none.

    Raises:
        OSError: it is gone already.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.ptrace(PTRACE_ATTACH, process.pid, None, None):
        raise OSError(ctypes.get_errno(), f"process {process.pid}")
    # Who is traced ends only once its tracer has taken notice.
    threading.Thread(target=_until_end, args=(process.pid,), daemon=True).start()


def _until_end(pid: int) -> None:
    status = os.waitpid(pid, WALL)[1]
    while os.WIFSTOPPED(status):
        status = os.waitpid(pid, WALL)[1]


def test_a_time_limit_with_and_without_its_warning(
    prepared: Study,
    tmp_path: Path,
    uninterrupted: dict[tuple, float],
    books: Callable,
    report: Report,
) -> None:
    warned, deaf = (copied(prepared, tmp_path / name) for name in ("warned", "deaf"))
    # Slurm looks every 30 s: its warning comes 40 to 70 s after the start.
    site = SITE.replace("signal_seconds: 30", "signal_seconds: 50")
    (warned.folder / "site.yaml").write_text(site)
    run = LONG.replace("minutes: 5", "minutes: 2")
    saved, lost = warned.plan(run), deaf.plan(run)
    waiting = [warned.start(saved), deaf.start(lost)]
    job, over = at_work(saved), at_work(lost)
    for process in ranks(deaf.box, over):
        hung(process)
    deaf.box.run("scontrol", "update", f"jobid={over}", "timelimit=1")
    # It would be done before its limit; Slurm's warning wakes it.
    for process in ranks(warned.box, job):
        process.suspend()
    report("the time limit comes near", "saved and queued again under the same id",
           recovered(saved, event(saved, "interrupted")))  # fmt: skip
    warned.box.run("scontrol", "update", f"jobid={job}", "timelimit=10")  # once is enough
    (row,) = wait_attempts(deaf.box, over, "TIMEOUT", seconds=120)
    ended = datetime.fromisoformat(row["End"]).timestamp()
    report("over the time limit, because it hung", "submitted again, with a new id",
           recovered(lost, ended))  # fmt: skip
    outputs = [process.communicate(timeout=120)[0] for process in waiting]
    assert [process.returncode for process in waiting] == [0, 0], outputs

    assert job_id(saved) == job
    wait_attempts(warned.box, job, "REQUEUED", "COMPLETED")
    assert states(saved) == ["INTERRUPTED", "COMPLETED"]
    assert f"job {over} ended as TIMEOUT" in outputs[1]
    assert job_id(lost) != over
    wait_attempts(deaf.box, str(job_id(lost)), "COMPLETED")
    for directory in (saved, lost):
        assert curve(directory) == uninterrupted
        books(directory)


def test_a_job_that_gets_nowhere_is_not_queued_for_ever(study: Study, books: Callable) -> None:
    directory = study.plan(LONG)
    waiting = study.start(directory)
    wait_for("the job", lambda: job_id(directory) is not None, seconds=30)
    job = str(job_id(directory))
    # The ranks have met, and made no step yet.
    meeting = f".job/ranks-{job}-0.json"
    wait_for("the ranks", (directory / meeting).exists, seconds=60, every=0.005)
    for process in ranks(study.box, job):
        process.suspend()
        process.send_signal(signal.SIGUSR2)
        process.resume()
    output, _ = waiting.communicate(timeout=90)
    assert waiting.returncode == 8, output
    assert "a whole time limit went by without one more checkpoint" in output
    assert "raise launch.minutes" in output
    assert len(wait_attempts(study.box, job, "FAILED")) == 1
    books(directory)


def test_a_debug_job_preempts_it(
    study: Study, uninterrupted: dict[tuple, float], books: Callable, report: Report
) -> None:
    (study.folder / "site.yaml").write_text(SITE + "qos: preemptible\n")
    directory = study.plan(LONG)
    filler = submit(study.box, "sleep 600", "--nodes=2", "--exclusive", "--mem=0")
    try:
        wait_state(study.box, filler, "RUNNING")
        waiting = study.start(directory)
        job = at_work(directory)
        began = time.time()
        urgent = submit(
            study.box, "sleep 2", "--qos=boost_qos_dbg", "--nodes=2", "--exclusive", "--mem=0"
        )
        wait_state(study.box, urgent, "COMPLETED", seconds=90)
        report("a debug job preempts it", "queued again under the same id by Slurm",
               recovered(directory, began))  # fmt: skip
        output, _ = waiting.communicate(timeout=120)
    finally:
        study.box.run("scancel", filler)
    assert waiting.returncode == 0, output
    assert job_id(directory) == job
    rows = wait_attempts(study.box, job, "PREEMPTED", "COMPLETED")
    assert len(rows) == 2
    assert curve(directory) == uninterrupted
    books(directory)


def test_controller_and_database_go_away(
    study: Study, uninterrupted: dict[tuple, float], books: Callable, report: Report
) -> None:
    directory = study.plan(LONG)
    waiting = study.start(directory)
    job = at_work(directory)
    # What the controller has not handed over yet when it is restarted, it forgets in part.
    wait_attempts(study.box, job, "RUNNING")
    began = time.time()
    study.box.stop_accounting()
    try:
        study.box.restart_controller()
        report("controller restarted, database down", "the training went on; nobody asked twice",
               recovered_without_restart(directory, began))  # fmt: skip
        output, _ = waiting.communicate(timeout=120)
    finally:
        study.box.start_accounting()
    assert waiting.returncode == 0, output
    assert job_id(directory) == job
    assert len(wait_attempts(study.box, job, "COMPLETED", seconds=60)) == 1
    assert states(directory) == ["COMPLETED"]
    assert curve(directory) == uninterrupted
    books(directory)


def test_a_full_file_system(
    prepared: Study, uninterrupted: dict[tuple, float], books: Callable, report: Report
) -> None:
    folder = prepared.box.small / "study"
    study = copied(prepared, folder)
    directory = study.plan(LONG)
    waiting = study.start(directory)
    job = at_work(directory)
    with open(prepared.box.small / "filler", "wb") as filler, pytest.raises(OSError, match="space"):
        while True:
            filler.write(bytes(1 << 20))
            filler.flush()
    output, _ = waiting.communicate(timeout=60)
    # Waiting takes a few bytes as well: who notices first is not said.
    assert waiting.returncode in (3, 8), output
    assert "No space left on device" in output or "disk full while writing" in output
    wait_attempts(study.box, job, "FAILED")
    began = time.time()
    (prepared.box.small / "filler").unlink()
    done = study.run(directory)
    if waiting.returncode == 3:
        # How the job ended was told to nobody yet; checkpoint or journal, which is written beside
        # it, met the full disk first.
        told = rf"job {job} ended as FAILED: (the checkpoint of step|disk full while writing)"
        assert re.search(told, done.stdout), done.stdout
        done = study.run(directory)
    assert done.returncode == 0, done.stdout
    report("the file system is full", "stopped and said so; the same command went on",
           recovered(directory, began))  # fmt: skip
    assert curve(directory) == uninterrupted
    read_manifest(directory, "train")
    assert [row["State"] for row in books(directory)] == ["FAILED", "COMPLETED"]
    shutil.rmtree(folder)


def test_a_cap_in_the_middle_of_a_grid(study: Study, books: Callable, report: Report) -> None:
    # One job of two nodes for five minutes fits, a second one beside it does not.
    cap = 1.5 * 2 * 5 / 60
    run = LONG + f"budget: {{cap_node_hours: {cap}}}\n"
    (study.folder / "grid.yaml").write_text(
        "study: micro\nbase: run.yaml\narms: {sentence: {}}\nseeds: [0, 1]\n"
    )
    first, second = study.plan_grid(run, "grid.yaml")
    waiting = study.start(first)
    at_work(first)
    refused = study.run(second)
    assert refused.returncode == 9, refused.stdout
    assert f"of {cap:.2f} node-hours" in refused.stdout
    assert "does not fit the cap of study micro" in refused.stdout
    assert job_id(second) is None
    books_so_far = abf(study, "report", "results/report/micro", "--so-far")
    assert f"sentence-s1: train/{second.name}: failed: refused: job abf-" in books_so_far
    assert f"of {cap:.2f} node-hours" in books_so_far
    output, _ = waiting.communicate(timeout=120)
    assert waiting.returncode == 0, output
    wait_attempts(study.box, str(job_id(first)), "COMPLETED")
    # What it did not use is free again.
    done = study.run(second)
    assert done.returncode == 0, done.stdout
    assert [row["State"] for row in books(first, second)] == ["COMPLETED", "COMPLETED"]
    report(
        "a cap reached in the middle of a grid", "running jobs finished, the next was refused", None
    )
