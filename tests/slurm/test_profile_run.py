"""`snakemake --profile leonardo`, literally, on a real scheduler; and drivers that die."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from abf.artifacts import LEDGER, read_manifest, read_table
from abf.cluster.jobs import tag
from abf.driver import orphans
from tests.slurm.books import assert_same
from tests.slurm.box import Box
from tests.slurm.daemons import wait_for
from tests.slurm.jobs import jobs_of, show, submit, wait_state
from tests.slurm.micro import RUN, SITE, Study
from tests.slurm.reliability import Report
from tests.workflow.conftest import ROOT

FAST = ("--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "5")
"""What is longer on Leonardo than a test can wait."""


class Site:
    """A working folder of a user whose profile is linked and whose site file is written."""

    def __init__(self, folder: Path, box: Box) -> None:
        self.folder, self.box = folder, box
        self.started: list[subprocess.Popen[str]] = []
        home = folder / "config"
        (home / "abf").mkdir(parents=True)
        (home / "abf" / "site.yaml").write_text(SITE)
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        self.env = box.env | {"XDG_CONFIG_HOME": str(home), "OMP_NUM_THREADS": "1", "PATH": path}
        self.env.pop("ABF_SITE", None)
        (folder / "run.yaml").write_text(RUN)
        os.symlink(ROOT / "workflow", folder / "workflow")
        done = self.call("abf", "link-profile", "leonardo", "--profiles", str(ROOT / "profiles"),
                         "--config-home", str(home))  # fmt: skip
        assert done.returncode == 0, done.stdout

    def call(self, *argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            argv, cwd=self.folder, env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def snakemake(self, *arguments: str, study: str = "run.yaml") -> list[str]:
        return [
            "snakemake",
            "--profile",
            "leonardo",
            *FAST,
            *arguments,
            "--config",
            f"study={study}",
        ]

    def start(self, *argv: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            argv, cwd=self.folder, env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        self.started.append(process)
        return process

    def end(self) -> None:
        """A test that failed must leave no driver behind."""
        for process in self.started:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)

    def jobs(self) -> list[dict[str, str]]:
        """Every attempt of every job submitted from here, as sacct tells it."""
        return jobs_of(self.box, self.folder)

    def plan(self) -> dict:
        return json.loads((self.folder / "results/plan/micro.json").read_text())


@pytest.fixture
def site(box: Box, tmp_path: Path) -> Iterator[Site]:
    """A user who has nothing yet."""
    (tmp_path / "user").mkdir()
    found = Site(tmp_path / "user", box)
    yield found
    found.end()


@pytest.fixture
def begun(box: Box, prepared: Study, tmp_path: Path) -> Iterator[Site]:
    """A user whose data and base model are made: what is left is training and after."""
    shutil.copytree(prepared.folder, tmp_path / "user", copy_function=shutil.copy2)
    found = Site(tmp_path / "user", box)
    yield found
    found.end()


def books_agree(site: Site) -> list[dict]:
    """The ledger stage's rows of the scheduler's jobs, held against sacct."""
    (path,) = (site.folder / "results").glob("ledger/*/ledger.parquet")
    ledger = [r for r in read_table(path, LEDGER).to_pylist() if r["node_hours"] is not None]
    assert_same(ledger, site.jobs())
    return ledger


def spent(site: Site, results: Path) -> str:
    """What `abf status` counts; a results folder that is named from the root, from elsewhere."""
    there = site.folder.parent if results.is_absolute() else site.folder
    done = subprocess.run(
        ["abf", "status", "--results", str(results)], cwd=there, env=site.env, text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("spent ")]
    return line


def test_the_users_command_runs_the_study_and_the_books_are_the_schedulers(site: Site) -> None:
    done = site.call(*site.snakemake())
    assert done.returncode == 0, done.stdout[-5000:]
    results = site.folder / "results"
    (page,) = results.glob("report/*/index.html")
    assert "sentence" in page.read_text()
    jobs = site.jobs()
    comments = {row["Comment"].split("_wildcards_")[0].split(" pretrain")[0] for row in jobs}
    assert {"rule_prepare", "rule_tokenize", "rule_decode", "rule_score"} <= comments
    assert {row["State"] for row in jobs} == {"COMPLETED"}

    ledger = books_agree(site)
    trained = next(row for row in ledger if row["rule"] == "train")
    assert (trained["nodes"], trained["gpus"]) == (2, 8)
    # A node that is measured is nobody else's.
    decoded = next(row for row in ledger if row["rule"] == "decode")
    (job,) = [row for row in jobs if row["JobIDRaw"] == decoded["job_id"]]
    assert ",cpu=32," in job["AllocTRES"]
    (path,) = results.glob("ledger/*/ledger.parquet")
    local = [r for r in read_table(path, LEDGER).to_pylist() if r["node_hours"] is None]
    assert {r["rule"] for r in local} <= {"fetch", "ledger", "report", "mlflow"}

    again = site.call(*site.snakemake())
    assert again.returncode == 0
    assert "Nothing to be done" in again.stdout
    assert len(site.jobs()) == len(jobs)

    # Another results folder of the same checkout, with jobs of the same rules and keys.
    before = spent(site, results)
    assert " node-hours " in before
    done = site.call(*site.snakemake("--until", "prepare"), "results=others")
    assert done.returncode == 0, done.stdout[-5000:]
    assert len(site.jobs()) == len(jobs) + 1
    assert "in 2 attempts" in spent(site, site.folder / "others")  # fetch and prepare
    assert spent(site, results) == before == spent(site, Path("results"))


def test_a_driver_killed_in_training_and_in_a_short_job_submits_nothing_twice(
    begun: Site, report: Report
) -> None:
    def live(comment: str) -> Callable[[], bool]:
        # Not by sacct: the database hears of a comment when the job ends.
        return lambda: (
            f"{begun.folder}|{comment}"
            in begun.box.run(
                "squeue", "--noheader", "--states=PENDING,RUNNING", "--format=%Z|%k"
            ).stdout
        )

    # Alone, so that its waiting rules live on; then with everything that hangs on it.
    for comment, kill in (("abf train", os.kill), ("rule_decode", os.killpg)):
        process = begun.start(*begun.snakemake())
        wait_for(comment, live(comment), seconds=240, every=0.2)
        kill(process.pid, signal.SIGKILL)
        process.wait()
    done = begun.call(*begun.snakemake())
    assert done.returncode == 0, done.stdout[-5000:]
    report("the driver killed in a training", "the job went on; the next driver attached", 0.0)
    report("the driver killed in a short job", "the next driver waited for it, then went on", 0.0)
    comments = [row["Comment"] for row in begun.jobs()]
    assert len(comments) == len(set(comments)), comments
    read_manifest(begun.folder / "results" / begun.plan()["cells"][0]["score"])
    (train,) = [row for row in books_agree(begun) if row["rule"] == "train"]
    assert train["state"] == "COMPLETED"


def test_scratch_is_emptied_between_two_runs(begun: Site, books: Callable, report: Report) -> None:
    scratch, work = begun.folder / "scratch", begun.folder / "work"
    scratch.mkdir()
    work.mkdir()
    shutil.move(begun.folder / "results", scratch / "results")
    os.symlink(scratch / "results", begun.folder / "results")
    path = Path(begun.env["XDG_CONFIG_HOME"]) / "abf" / "site.yaml"
    path.write_text(f"{SITE}storage: {{work: {work}, scratch: {scratch}, purge_days: 40}}\n")
    done = begun.call(*begun.snakemake("--until", "train"))
    assert done.returncode == 0, done.stdout[-5000:]
    train = begun.folder / "results" / begun.plan()["cells"][0]["train"]
    place = f"train/{train.name}"
    before, jobs = (train / "model" / "model.safetensors").read_bytes(), len(begun.jobs())
    shutil.rmtree(scratch)
    # The model is in the kept copies; what the tokens were is not.
    (lost,) = work.glob("abf-results/*/tokenize/*")
    shutil.rmtree(lost)
    began = time.time()
    done = begun.call(*begun.snakemake("--until", "train"))
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"restored {place} " in done.stdout
    assert f"lost: tokenize/{lost.name}: " in done.stdout
    assert (train / "model" / "model.safetensors").read_bytes() == before
    new = [row["Comment"] for row in begun.jobs()[jobs:]]
    assert not [comment for comment in new if comment.startswith("abf train")], new
    places = begun.plan()["stages"]
    books(*(begun.folder / "results" / place for place in places))
    report("scratch emptied between two runs", "restored from the project area; what is not "
           "there is named and made again", time.time() - began)  # fmt: skip


def test_every_cell_of_a_grid_waits_in_the_queue_at_once(begun: Site) -> None:
    cells = 7  # more than the five workers that Snakemake has by default
    (begun.folder / "grid.yaml").write_text(
        f"study: many\nbase: run.yaml\narms: {{sentence: {{}}}}\nseeds: {list(range(cells))}\n"
    )
    filler = submit(begun.box, "sleep 600", "--nodes=4", "--exclusive", "--mem=0")
    wait_state(begun.box, filler, "RUNNING")
    try:
        begun.start(*begun.snakemake(study="grid.yaml"))

        def waiting() -> int:
            text = begun.box.run("squeue", "--noheader", "--states=PENDING", "--format=%Z|%k")
            return text.stdout.count(f"{begun.folder}|abf train")

        wait_for(f"{cells} waiting trainings", lambda: waiting() == cells, seconds=90, every=0.5)
    finally:
        begun.end()
        begun.box.run("scancel", "--user=root")


def test_a_dead_drivers_job_is_waited_for(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    done = site.call("abf", "plan", "run.yaml")
    assert done.returncode == 0
    cell = site.plan()["cells"][0]
    stage, _, key = cell["packed"].partition("/")
    comment = f"--comment=rule_{stage}_wildcards_{key}"
    here, results = ("--chdir", str(site.folder)), site.folder / "results"
    job = submit(site.box, "sleep 8", f"--job-name={tag(results)}_0000", comment, *here)
    elsewhere = tag(site.folder / "others")  # another results folder of the same checkout
    other = submit(site.box, "sleep 60", f"--job-name={elsewhere}_0000", comment, *here)
    monkeypatch.setenv("SLURM_CONF", site.env["SLURM_CONF"])
    monkeypatch.chdir(site.folder)
    assert [found.job_id for found in orphans(results, [f"{stage}/{key}"])] == [job]
    assert orphans(results, [f"{stage}/another"]) == []
    done = site.call(*site.snakemake("--until", "fetch"))
    assert done.returncode == 0, done.stdout
    assert f"job {job} (rule_{stage}_wildcards_{key}" in done.stdout
    assert show(site.box, job)["JobState"] == "COMPLETED"
    site.box.run("scancel", other)


def test_scancel_of_a_rules_job_is_noticed(begun: Site) -> None:
    (pack,) = [begun.folder / "results" / begun.plan()["cells"][0]["packed"]]
    shutil.rmtree(pack)
    # Four nodes full of other work: the next job waits in the queue, where it is cancelled.
    filler = submit(begun.box, "sleep 600", "--nodes=4", "--exclusive", "--mem=0")
    try:
        wait_state(begun.box, filler, "RUNNING")
        process = begun.start(*begun.snakemake("--until", "pack"))

        def waiting() -> list[str]:
            text = begun.box.run("squeue", "--noheader", "--states=PENDING", "--format=%i|%k")
            rows = [line.split("|") for line in text.stdout.splitlines()]
            return [job for job, comment in rows if comment == f"rule_pack_wildcards_{pack.name}"]

        wait_for("a waiting job", lambda: bool(waiting()), seconds=60, every=0.3)
        (job,) = waiting()
        begun.box.run("scancel", job)
        # The profile allows one more try, cancelled as well; two minutes is what may be lost.
        wait_for("the second try", lambda: bool(waiting()), seconds=120, every=0.3)
        begun.box.run("scancel", *waiting())
        output, _ = process.communicate(timeout=120)
    finally:
        begun.box.run("scancel", filler)
    assert process.returncode != 0
    assert "CANCELLED" in output


def test_a_missing_site_file_is_one_message(site: Site) -> None:
    (Path(site.env["XDG_CONFIG_HOME"]) / "abf" / "site.yaml").unlink()
    done = site.call(*site.snakemake("-n"))
    assert done.returncode != 0
    assert "account: YOUR_ACCOUNT" in done.stdout
