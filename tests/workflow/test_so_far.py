"""A study with a cell that cannot finish: its books at once, then the same command to the end."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from abf import study
from abf.artifacts import LEDGER, read_plans, read_table
from abf.files import lock
from abf.so_far import missing_cells
from abf.track.attempts import read_attempts
from tests.workflow.conftest import RESULTS, Project
from tests.workflow.test_seeing import abf
from tests.workflow.test_workflow import forget


def ledger(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Rows of a ledger by stage and slug of the directory, in order of time."""
    rows = sorted(read_table(path, LEDGER).to_pylist(), key=lambda row: row["submit_time"])
    found: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(f"{row['rule']}/{row['run'].partition('-s0')[0]}", []).append(row)
    return found


def runs(project: Project) -> tuple[Any, dict[str, Any]]:
    """The parent run and its children by name, as MLflow's own client sees them."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{project.results / 'mlflow' / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("micro")
    assert experiment is not None
    found = list(client.search_runs([experiment.experiment_id]))
    (parent,) = (run for run in found if run.data.tags["abf.kind"] == "grid")
    children = [run for run in found if run.data.tags["abf.kind"] == "cell"]
    assert {run.data.tags["mlflow.parentRunId"] for run in children} == {parent.info.run_id}
    named = {str(run.info.run_name): run for run in children}
    assert len(named) == len(children), "one run a cell"
    return parent, named


def test_a_driver_that_has_called_us_is_not_at_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not study.is_driven(tmp_path)
    with lock(tmp_path / ".driver", "snakemake"):
        assert study.is_driven(tmp_path)
        monkeypatch.setattr(os, "getppid", os.getpid)  # as it is for a child of the driver's
        assert not study.is_driven(tmp_path)
    assert not study.is_driven(tmp_path)


def test_a_job_that_ended_before_it_could_write_a_word_is_named(copy: Project) -> None:
    forget(copy, "score", "ledger", "report")
    (plan,) = read_plans(copy.results)
    cell = next(cell for cell in plan["cells"] if cell["name"] == "fixed-s0")
    stage, _, key = cell["score"].partition("/")
    row = {"rule": stage, "run": key, "submit_time": "2026-01-01", "attempt": 1}
    row |= {"state": "NODE_FAIL", "reason": ""}
    told = missing_cells(plan, copy.results, [row])
    assert told["fixed-s0"] == f"{cell['score']}: to do (attempt 1): NODE_FAIL"
    assert told["sentence-s0"].endswith(": to do")
    assert "score/sentence-s0-" in told["sentence-s0"]


def test_a_cell_that_cannot_finish_leaves_books_that_give_way(copy: Project) -> None:
    forget(copy, "train", "decode", "score", "ledger", "report")
    shutil.rmtree(copy.results / "mlflow")
    bad = copy.directory("train", "sentence")
    (bad / "ckpt").write_text("a file where the folder of checkpoints should be")
    report = copy.results / "report" / "micro"
    so_far = report / "so-far"

    # Somebody holds MLflow's store: one line says so, and nothing else is the worse for it.
    with lock(copy.results / "mlflow" / "artifacts", "the test"):
        failed = copy.run()
    assert failed.returncode == 1
    assert "At least one job did not complete successfully" in failed.stdout
    (line,) = re.findall("^abf report: .*", failed.stdout, re.MULTILINE)
    assert "is in use by the test" in line
    assert not (copy.results / "ledger" / "micro" / "manifest.json").exists()
    assert not (report / "index.html").exists()

    rows = ledger(so_far / "ledger.parquet")
    (failure,) = rows["train/sentence"]
    assert failure["state"] == "FAILED"
    assert failure["reason"] == read_attempts(bad)[-1]["reason"]
    assert "Not a directory" in failure["reason"]
    assert [row["state"] for row in rows["score/fixed"]] == ["COMPLETED"]
    assert "score/sentence" not in rows

    page = (so_far / "index.html").read_text()
    assert "Not finished: 1 of 2 cells" in page
    told = f"train/{bad.name}: failed (attempt 1): the checkpoint of step 2 could not be written"
    assert f"<b>sentence-s0</b>: {told}" in page
    assert f"  sentence-s0: {told}" in failed.stdout

    by_hand = ("report", f"{RESULTS}/report/micro", "--so-far")
    assert f"sentence-s0: {told}" in abf(copy, *by_hand, results=False)
    parent, cells = runs(copy)
    assert parent.info.status == cells["sentence-s0"].info.status == "FAILED"
    spent = cells["sentence-s0"].data.metrics
    assert (spent["cost/attempts"], spent["cost/failed_attempts"]) == (1, 1)
    assert spent["cost/core_hours"] == pytest.approx(failure["core_hours"])
    assert cells["sentence-s0"].data.tags["abf.attempt_states"] == "1 FAILED"
    assert cells["fixed-s0"].info.status == "FINISHED"
    assert cells["fixed-s0"].data.metrics["heldout/ar_bits_per_byte"] > 0
    before = {name: run.info.run_id for name, run in cells.items()}

    (bad / "ckpt").unlink()
    done = copy.run()
    assert done.returncode == 0, done.stdout[-4000:]
    assert not so_far.exists()
    assert "Not finished" not in (report / "index.html").read_text()
    complete = ledger(copy.results / "ledger" / "micro" / "ledger.parquet")
    assert [row["state"] for row in complete["train/sentence"]] == ["FAILED", "COMPLETED"]
    assert complete["score/fixed"] == rows["score/fixed"]

    parent, cells = runs(copy)
    assert {name: run.info.run_id for name, run in cells.items()} == before
    assert {run.info.status for run in [parent, *cells.values()]} == {"FINISHED"}
    everything = [row for rows in complete.values() for row in rows]
    assert parent.data.metrics["cost/attempts"] == len(everything)
    hours = sum(row["core_hours"] for row in everything)
    assert parent.data.metrics["cost/core_hours"] == pytest.approx(hours)
    assert cells["sentence-s0"].data.metrics["cost/attempts"] == 4
    assert cells["sentence-s0"].data.metrics["heldout/ar_bits_per_byte"] > 0
