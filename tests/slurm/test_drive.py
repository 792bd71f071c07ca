"""The driver as a chain of jobs: it finishes, queues again, is refused twice, and is ended."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from tests.slurm.box import Box
from tests.slurm.daemons import wait_for
from tests.slurm.jobs import show, wait_attempts, wait_state
from tests.slurm.micro import Study
from tests.slurm.test_profile_run import Site


@pytest.fixture
def site(box: Box, prepared: Study, tmp_path: Path) -> Site:
    """A user whose data and base model are made."""
    shutil.copytree(prepared.folder, tmp_path / "user", copy_function=shutil.copy2)
    found = Site(tmp_path / "user", box)
    # The profile's own pauses are minutes; a driver takes no options of its own.
    profile = found.folder / "config" / "snakemake" / "quick"
    profile.mkdir()
    text = (Path(found.env["XDG_CONFIG_HOME"]) / "snakemake/leonardo/config.yaml").read_text()
    text = text.replace("status-checks: 40", "status-checks: 3").replace("wait: 60", "wait: 5")
    (profile / "config.yaml").write_text(text)
    return found


def start(site: Site) -> str:
    done = site.call("abf", "drive", "start", "run.yaml", "--profile", "quick")
    assert done.returncode == 0, done.stdout
    return state(site)["job_id"]


def trainings(site: Site) -> list[str]:
    return [r["JobIDRaw"] for r in site.jobs() if r["Comment"].startswith("abf train")]


def state(site: Site) -> dict:
    return json.loads((site.folder / "results/.driver/drive.json").read_text())


def test_a_driver_in_the_queue_finishes_the_study(site: Site) -> None:
    job = start(site)
    second = site.call("abf", "drive", "start", "run.yaml", "--profile", "quick")
    assert second.returncode == 6
    assert f"driven by job {job}" in second.stdout
    wait_state(site.box, job, "RUNNING")
    assert f"driver job {job} on run.yaml: RUNNING" in site.call("abf", "drive", "status").stdout
    assert show(site.box, job)["Partition"] == "lrd_all_serial"

    # Its time is nearly up, in the middle of the work: the same id queues again and goes on.
    wait_for("a training", lambda: bool(trainings(site)), seconds=200, every=0.3)
    site.box.run("scancel", "--signal=USR1", "--batch", job)
    followed = site.call("abf", "drive", "follow")
    assert followed.returncode == 0
    assert "time is up, queueing again" in followed.stdout
    assert state(site)["state"] == "finished", followed.stdout[-3000:]
    rows = wait_attempts(site.box, job, "REQUEUED", "COMPLETED")
    assert len(rows) == 2
    assert list(site.folder.glob("results/report/*/index.html"))
    comments = [row["Comment"] for row in site.jobs() if row["JobIDRaw"] != job]
    assert len(comments) == len(set(comments)), comments


def test_a_stopped_driver_leaves_its_jobs(site: Site) -> None:
    job = start(site)
    wait_for("a training", lambda: bool(trainings(site)), seconds=200, every=0.3)
    done = site.call("abf", "drive", "stop")
    assert done.returncode == 0
    wait_state(site.box, job, "CANCELLED")
    (training,) = trainings(site)
    wait_attempts(site.box, training, "COMPLETED", seconds=60)
    assert site.call("abf", "drive", "stop").returncode == 8
