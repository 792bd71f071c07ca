"""The shared look at the queue: few questions for many waiters, and states as Slurm tells them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest

from abf.cluster import slurm
from abf.cluster.poll import UNKNOWN, JobState, Watch, look
from abf.errors import ClusterError
from tests.slurm.box import Box
from tests.slurm.jobs import submit, wait_attempts, wait_state

WAITERS = 12
WAIT = """
import sys
from pathlib import Path
from abf.cluster.poll import Watch
state = Watch(Path(sys.argv[1]), interval=2.0).wait(sys.argv[2], until=lambda s: False)
print(state.state)
"""


@pytest.fixture(autouse=True)
def conf(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", box.env["SLURM_CONF"])


def counting(folder: Path, name: str) -> Path:
    """A command of this name that notes every call, then is the real one."""
    real, calls = shutil.which(name), folder / f"{name}.calls"
    script = folder / name
    script.write_text(f'#!/bin/sh\necho "$(date +%s.%N)" >> {calls}\nexec {real} "$@"\n')
    script.chmod(0o755)
    return calls


def test_many_waiters_ask_as_often_as_one(box: Box, tmp_path: Path) -> None:
    queue, records = counting(tmp_path, "squeue"), counting(tmp_path, "sacct")
    job = submit(box, "sleep 14")
    env = box.env | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    waiting = [
        subprocess.Popen(
            [sys.executable, "-c", WAIT, str(tmp_path / "driver"), job],
            env=env, stdout=subprocess.PIPE, text=True,
        )
        for _ in range(WAITERS)
    ]  # fmt: skip
    ended = [process.communicate(timeout=90)[0].strip() for process in waiting]
    assert ended == ["COMPLETED"] * WAITERS
    # One question an interval, whoever asks.
    asked = [float(line) for line in queue.read_text().splitlines()]
    assert len(asked) > 3
    assert min(later - earlier for earlier, later in pairwise(asked)) >= 1.9
    assert not records.exists(), "sacct is for jobs that the queue has forgotten"


def test_a_waiter_that_died_while_looking_stops_nobody(box: Box, tmp_path: Path) -> None:
    job = submit(box, "sleep 2")
    hold = f"import sys, time; from pathlib import Path; from abf.files import lock\n\
with lock(Path({str(tmp_path)!r}) / 'poll', 'x'): print('held', flush=True); time.sleep(600)"
    holder = subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    watch = Watch(tmp_path, interval=0.5)
    watch.add(job)
    assert watch.state(job) is None  # somebody else is looking
    holder.kill()
    holder.communicate()
    assert watch.wait(job, until=lambda s: False).state == "COMPLETED"


def test_an_answer_that_does_not_come_keeps_what_was_known(
    box: Box, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = submit(box, "sleep 60")
    wait_state(box, job, "RUNNING")
    watch = Watch(tmp_path, interval=0.0)
    watch.add(job)
    before = watch.state(job)
    assert before is not None
    assert before.state == "RUNNING"
    assert watch.trouble() == ""

    def silent(**_: object) -> list[slurm.QueuedJob]:
        raise ClusterError("squeue did not answer within 120 s")

    with monkeypatch.context() as patch:
        patch.setattr(slurm, "queue", silent)
        assert watch.state(job) == before
        assert "did not answer" in watch.trouble()
    box.run("scancel", job)
    assert watch.wait(job, until=lambda s: False).state == "CANCELLED"


def test_the_records_speak_for_what_the_queue_forgot(box: Box) -> None:
    job = submit(box, "exit 3")
    wait_state(box, job, "FAILED")
    wait_attempts(box, job, "FAILED")  # the database hears of it some seconds later
    records = slurm.records([job, "987654"])
    assert records.keys() == {job}
    assert (records[job].state, records[job].exit_code) == ("FAILED", "3:0")
    unknown = look(["987654"], {})["987654"]
    assert unknown.state == UNKNOWN
    assert unknown.unknown_since is not None
    later = look(["987654"], {"987654": JobState(UNKNOWN, unknown_since=12.0)})["987654"]
    assert later.unknown_since == 12.0
