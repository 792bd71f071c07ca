"""Everything after `fetch` computes where there is no network at all, as on a compute node."""

from __future__ import annotations

import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from tests.workflow import isolated
from tests.workflow.conftest import Project
from tests.workflow.test_workflow import curve, forget, weights

COMPUTE = ("prepare", "tokenizer", "tokenize", "segment", "pack")
COMPUTE += ("base", "convert", "train", "decode", "score")
"""What runs in jobs; the driver does the rest."""
JOBS = """
import sys
from abf.cli import main
for directory in sys.argv[1:]:
    stage = directory.split("/")[1]
    if status := main([stage, directory]):
        sys.exit(f"{directory}: {status}")
"""
"""What the jobs run, one directory after the other; one process, since imports take longest."""
RANKS = """
import os, subprocess, sys
one = "import sys; from abf.launch import TrainJob; TrainJob('train', sys.argv[1])()"
task = lambda rank: os.environ | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
ranks = [subprocess.Popen([sys.executable, "-c", one, sys.argv[1]], env=task(r)) for r in (0, 1)]
sys.exit(max(abs(rank.wait()) for rank in ranks))
"""
"""What srun does with a training job: the same call in every task, told apart by its variables."""


@pytest.fixture(scope="module")
def namespace() -> tuple[str, ...]:
    """How to start a process without a network; a skip where this machine gives out none."""
    found = isolated.way()
    if isinstance(found, str):
        pytest.skip(f"no network namespace can be had here: {found}")
    return found


def scores(directory: Path) -> list[tuple[object, ...]]:
    """Rows of a score stage that do not depend on the clock."""
    rows = pq.read_table(directory / "scores.parquet").to_pylist()
    return [tuple(row.values()) for row in rows if row["metric"] != "tokens_per_second"]


def attempts_beside_the_probe(file: Path) -> list[str]:
    """Attempts to connect, without the one that showed that there is no network."""
    first, *others = file.read_text().splitlines()
    assert first.startswith(f"socket.connect {isolated.OUTSIDE}")
    return others


def test_prepare_to_score_without_a_network(
    copy: Project, tmp_path: Path, namespace: tuple[str, ...]
) -> None:
    run, scored = (copy.directory(stage, "sentence-s0") for stage in ("train", "score"))
    known = weights(run), curve(run), scores(scored)
    forget(copy, *COMPUTE)
    left = [
        config.parent.relative_to(copy.folder)
        for stage in COMPUTE
        for config in sorted((copy.results / stage).rglob("config.json"))
    ]
    # The other arm's would show nothing more.
    jobs = [str(directory) for directory in left if "/fixed" not in str(directory)]
    assert len(jobs) == len(COMPUTE) + 1, jobs
    done = isolated.run(
        [sys.executable, "-c", JOBS, *jobs],
        cwd=copy.folder,
        namespace=namespace,
        attempts=tmp_path / "attempts",
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert isolated.ABSENT in done.stdout
    assert attempts_beside_the_probe(tmp_path / "attempts") == []
    assert (weights(run), curve(run), scores(scored)) == known


def test_two_ranks_of_a_training_job_meet_on_loopback(
    copy: Project, tmp_path: Path, namespace: tuple[str, ...]
) -> None:
    run = copy.directory("train", "sentence-s0")
    known = curve(run)
    forget(copy, "train")
    done = isolated.run(
        [sys.executable, "-c", RANKS, str(run.relative_to(copy.folder))],
        cwd=copy.folder,
        namespace=namespace,
        attempts=tmp_path / "attempts",
        env={"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_JOB_NUM_NODES": "1"},
    )
    assert done.returncode == 0, done.stdout[-6000:]
    assert isolated.ABSENT in done.stdout
    assert attempts_beside_the_probe(tmp_path / "attempts") == []
    found = curve(run)
    assert [row[:3] for row in found] == [row[:3] for row in known]
    assert [row[3] for row in found] == pytest.approx([row[3] for row in known], rel=1e-4, abs=1e-6)
