"""Trainings as jobs of a real scheduler: two nodes, eight ranks, and everything that ends a job."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from abf.artifacts import METRICS, read_manifest, read_table
from abf.track.attempts import read_attempts
from tests.slurm.box import Box
from tests.slurm.daemons import wait_for
from tests.slurm.jobs import attempts, show, wait_attempts, wait_state
from tests.workflow.conftest import ROOT

RUN = """
study: micro
sources: [{kind: stdlib, pattern: "[a-f]*.py", max_documents: 16}]
prepare: {heldout_fraction: 0.2}
tokenizer: {kind: trained, vocab_size: 400}
pack: {row_length: 64, max_block: 16}
base:
  kind: pretrain
  shape: {d_model: 16, layers: 1, heads: 2, kv_heads: 1, d_ff: 32}
  train: {objective: {kind: ar}, tokens: 2000, batch_rows: 8, precision: fp32, attention: reference}
train:
  tokens: 2560
  batch_rows: 8
  precision: fp32
  attention: reference
  checkpoint_steps: 2
  log_steps: 1
launch: {nodes: 2, ranks_per_node: 4, minutes: 5}
tasks: {heldout: {kind: likelihood, max_rows: 4, samples: 1}}
"""
LONG = RUN.replace("tokens: 2560", "tokens: 500_000").replace(
    "ranks_per_node: 4", "ranks_per_node: 1"
)
"""About 1,000 steps: long enough to be met at work. Two ranks: eight share two cores here."""
SITE = """
account: euhpc_test
poll_seconds: 1
signal_seconds: 30
unknown_seconds: 5
"""


class Study:
    """A working folder whose data and base model are made; trainings go to the box."""

    def __init__(self, folder: Path, box: Box) -> None:
        self.folder, self.box = folder, box
        (folder / "site.yaml").write_text(SITE)
        self.env = box.env | {"ABF_SITE": str(folder / "site.yaml"), "OMP_NUM_THREADS": "1"}
        self.abf = (sys.executable, "-m", "abf.cli")

    def plan(self, run: str) -> Path:
        """Plan this run file; the training's directory."""
        (self.folder / "run.yaml").write_text(run)
        done = subprocess.run(
            [*self.abf, "plan", "run.yaml"],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        plan = json.loads((self.folder / "results/plan/micro.json").read_text())
        return self.folder / "results" / plan["cells"][0]["train"]

    def command(self, directory: Path) -> list[str]:
        return [*self.abf, "train", str(directory.relative_to(self.folder)), "--submit"]

    def start(self, directory: Path) -> subprocess.Popen[str]:
        """A waiting process."""
        return subprocess.Popen(
            self.command(directory), cwd=self.folder, env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, directory: Path) -> subprocess.CompletedProcess[str]:
        """Wait for the training."""
        return subprocess.run(
            self.command(directory), cwd=self.folder, env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


@pytest.fixture(scope="session")
def prepared(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Everything before training, made on this machine."""
    study = Study(tmp_path_factory.mktemp("slurm"), box)
    inputs = json.loads((study.plan(RUN) / "config.json").read_text())["inputs"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow" / "Snakefile")),
            *("--profile", str(ROOT / "profiles" / "local"), "--config", "study=run.yaml"),
            *("--", *(f"results/{place}/manifest.json" for place in inputs.values())),
        ],
        cwd=study.folder, env=study.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return study


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
    waiting = study.start(directory)
    job = at_work(directory)
    os.killpg(waiting.pid, signal.SIGKILL)
    waiting.communicate()
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert f"attached to job {job}" in done.stdout
    assert "submitted as" not in done.stdout
    assert [row["State"] for row in wait_attempts(study.box, job, "COMPLETED")] == ["COMPLETED"]
    assert curve(directory) == uninterrupted


def test_an_id_that_was_never_written_down_is_found_by_its_name(study: Study) -> None:
    directory = study.plan(LONG)
    waiting = study.start(directory)
    job = at_work(directory)
    os.killpg(waiting.pid, signal.SIGKILL)
    waiting.communicate()
    record = json.loads((directory / "job.json").read_text())
    (directory / "job.json").write_text(json.dumps(record | {"job_id": None}))
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert f"attached to job {job}" in done.stdout


def test_what_finished_unseen_is_only_declared(study: Study) -> None:
    directory = study.plan(RUN)
    waiting = study.start(directory)
    wait_for("an id", lambda: job_id(directory) is not None, seconds=30, every=0.05)
    job = str(job_id(directory))
    os.killpg(waiting.pid, signal.SIGKILL)
    waiting.communicate()
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
    began = time.monotonic()
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    assert time.monotonic() - began > 5
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
