"""What tests see of a training: its job's id, its curve, its attempts; and how they leave it."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path

from abf.artifacts import METRICS, read_table
from abf.track.attempts import read_attempts
from tests.slurm.daemons import wait_for
from tests.slurm.micro import Study
from tests.train.equality import CLOCKS


def curve(directory: Path) -> dict[tuple, float]:
    """Every metric of every step, but those of the clock."""
    rows = read_table(directory / "metrics.parquet", METRICS).to_pylist()
    return {(row["step"], row["name"]): row["value"] for row in rows if row["name"] not in CLOCKS}


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
