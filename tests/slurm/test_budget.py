"""The budget against a real scheduler: colleagues, queue, a cap reached in the middle of a grid."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from abf.cluster.config import AllocationConfig, SiteConfig
from abf.ledger.budget import measure
from tests.slurm.box import Box
from tests.slurm.daemons import wait_for
from tests.slurm.jobs import submit, wait_attempts, wait_state
from tests.workflow.conftest import ROOT

TODAY = datetime.now(UTC).date()
COLLEAGUE = "daemon"
"""A user that every Debian has; root submits in its name."""
RULE = """
import subprocess, sys
from pathlib import Path
from abf.errors import BudgetError
from abf.ledger.reserve import allow
from abf.site import load_site
place = sys.argv[1]
try:
    with allow(2.0, place=place, job_name=f"job-{place[6:]}", results=Path("results"),
               site=load_site()) as note:
        command = ["sbatch", "--parsable", f"--job-name=job-{place[6:]}", "--nodes=2", "--time=60",
            "--exclusive", "--ntasks-per-node=4", "--cpus-per-task=8", "--gpus-per-node=4",
            "--partition=boost_usr_prod", "--output=/dev/null", "--wrap=sleep 600"]
        note(subprocess.check_output(command, text=True).strip())
    print("submitted")
except BudgetError as error:
    print(f"refused: {error}")
"""


@pytest.fixture(autouse=True)
def conf(box: Box, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Ask the box, from a folder of one's own, and leave no job behind."""
    monkeypatch.setenv("SLURM_CONF", box.env["SLURM_CONF"])
    monkeypatch.chdir(tmp_path)
    looks: list[float] = []

    def settled() -> bool:
        used = measure(tmp_path, site(box))[0]
        looks.append(used.spent_node_hours + used.committed_node_hours)
        return len(looks) > 1 and looks[-1] == looks[-2]

    # The last seconds of jobs that ended right before may not be on record yet.
    wait_for("the books of tests before", settled, seconds=60, every=1.5)
    yield
    box.run("scancel", f"--account={box.account}")
    empty = ("squeue", "--noheader", f"--account={box.account}", "--states=PD,R,CG")
    wait_for("an empty queue", lambda: not box.run(*empty).stdout, seconds=60, every=0.3)


def site(box: Box, node_hours: float = 90_000) -> SiteConfig:
    granted = AllocationConfig(
        node_hours=node_hours, start=TODAY - timedelta(1), end=TODAY + timedelta(30)
    )
    return SiteConfig(account=box.account, allocation=granted)


def test_colleagues_queued_and_whole_node_jobs_count(box: Box, tmp_path: Path) -> None:
    box.run("sacctmgr", "-i", "add", "user", COLLEAGUE, f"account={box.account}", check=False)
    before = measure(tmp_path, site(box))[0]
    job = submit(box, "sleep 300", "--exclusive", "--nodes=4", "--mem=0", "--time=60")
    wait_state(box, job, "RUNNING")
    # Nothing is free: these wait. The second shares nodes, the third is five tasks of one record.
    whole = box.run(
        *("sbatch", "--parsable", f"--uid={COLLEAGUE}", f"--account={box.account}", "--chdir=/tmp"),
        *("--partition=boost_usr_prod", "--time=20", "--output=/dev/null", "--exclusive"),
        *("--nodes=3", "--wrap", "true"),
    ).stdout.strip()
    shared = submit(box, "true", "--gres=gpu:1", "--cpus-per-task=8", "--time=30")
    array = submit(box, "true", "--array=0-8:2", "--gres=gpu:2", "--time=60")
    for waiting in (whole, shared, array):
        wait_attempts(box, waiting, "PENDING")
    used, attempts = measure(tmp_path, site(box))
    assert {a.user for a in attempts if a.job_id in (job, whole)} == {"root", COLLEAGUE}
    added = used.committed_node_hours - before.committed_node_hours
    added += used.spent_node_hours - before.spent_node_hours
    # 4 nodes 1 h (spent so far and rest), 3 whole nodes 20 min, a quarter 30 min, 5 halves 1 h
    assert added == pytest.approx(4 + 1 + 0.125 + 2.5, abs=1e-6)
    assert used.spent_node_hours > before.spent_node_hours
    box.run("scancel", whole, shared, array, job)
    wait_attempts(box, job, "CANCELLED")
    ended, attempts = measure(tmp_path, site(box))
    assert ended.committed_node_hours == pytest.approx(before.committed_node_hours, abs=1e-6)
    cost = [a.elapsed_s * 4 / 3600 for a in attempts if a.job_id == job]
    assert ended.spent_node_hours - before.spent_node_hours == pytest.approx(sum(cost))


def test_a_cap_reached_in_the_middle_of_a_grid(box: Box, tmp_path: Path) -> None:
    """Seven rules at once, room for three jobs: three run, four are refused, then two more fit."""
    places = [f"train/t{i}" for i in range(7)]
    (tmp_path / "results/plan").mkdir(parents=True)
    document = {"study": "grid", "grid": "grid.yaml", "stages": places, "cells": []}
    (tmp_path / "results/plan/grid.json").write_text(json.dumps(document))
    before = measure(tmp_path, site(box))[0]
    cap = before.spent_node_hours + before.committed_node_hours + 7.0
    (tmp_path / "site.yaml").write_text(
        f"account: {box.account}\npoll_seconds: 1\nallocation: {{node_hours: {cap}, "
        f"start: {TODAY - timedelta(1)}, end: {TODAY + timedelta(30)}}}\n"
    )
    env = box.env | {"ABF_SITE": str(tmp_path / "site.yaml"), "PYTHONPATH": str(ROOT)}
    env |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def ask(*asked: str) -> list[str]:
        rules = [
            subprocess.Popen(
                [sys.executable, "-c", RULE, place],
                cwd=tmp_path, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            )
            for place in asked
        ]  # fmt: skip
        return [rule.communicate(timeout=120)[0].strip() for rule in rules]

    answers = dict(zip(places, ask(*places), strict=True))
    submitted = [place for place, answer in answers.items() if answer == "submitted"]
    refused = [place for place, answer in answers.items() if answer.startswith("refused")]
    assert (len(submitted), len(refused)) == (3, 4), answers
    assert re.search(r"2\.00 of this job = .* 1\.0\d too many", answers[refused[0]])

    def queue() -> list[str]:
        return box.run("squeue", "--noheader", "--format=%j %T").stdout.splitlines()

    def running() -> bool:
        return sum("RUNNING" in line for line in queue()) == 2  # four nodes, two each

    wait_for("two jobs at work", running, seconds=30, every=0.3)
    assert {line.split()[0] for line in queue()} == {f"job-{place[6:]}" for place in submitted}

    def page() -> str:
        done = subprocess.run(
            [sys.executable, "-m", "abf.cli", "budget", "--plot", "plot.svg"],
            cwd=tmp_path, env=env, text=True, capture_output=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout

    # On record they are committed, no longer reserved: counted once.
    wait_for("records", lambda: "reserved            0.00" in page(), seconds=20, every=0.5)
    text = page()
    used = measure(tmp_path, site(box, cap))[0]
    total = used.spent_node_hours + used.committed_node_hours
    assert total == pytest.approx(cap - 1.0, abs=1e-6)
    assert "RUNNING" in text
    assert "PENDING" in text
    assert (tmp_path / "plot.svg").read_text().startswith("<?xml")

    # What ends early gives back what it had committed.
    box.run("scancel", f"--name=job-{submitted[0][6:]}")
    wait_for("its end", lambda: "CANCELLED" in page(), seconds=20, every=0.5)
    again = ask(*refused)
    assert sorted(answer.partition(":")[0] for answer in again) == ["refused"] * 3 + ["submitted"]
