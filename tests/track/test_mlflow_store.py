"""Ingest into a real sqlite store, read back through MlflowClient."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow import MlflowClient

from abf.track.journal import Journal
from abf.track.mlflow_points import Point
from abf.track.mlflow_store import BOOKKEEPING
from abf.track.mlflow_view import GRIDS, experiment_tags, runs_page
from abf.track.mlflow_writer import ClientWriter, SqliteWriter
from tests.track.cells import STEPS, Store, make_cell, make_plan, write_steps


def test_read_back(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    results = tmp_path / "results"
    plan = make_plan(
        results,
        make_cell(results, "fixed-0"),
        make_cell(results, "fixed-1", finished=False),
        replace(make_cell(results, "x"), run="none", stage_dirs={}, journals=[]),
        figures=[results / "curve.svg"],
    )
    counts = store.ingest(plan)
    expected = {"runs": 2, "runs_created": 3, "points": 2 * 3 * STEPS + 3, "waiting": 1}
    assert counts == expected | {"experiment": counts["experiment"]}

    content = store.content()
    assert sorted(content) == ["fixed-0", "fixed-1", "grid"]
    done, failed, grid = content["fixed-0"], content["fixed-1"], content["grid"]

    loss = done["metrics"]["train/loss"]
    assert [step for step, _, _ in loss] == list(range(1, STEPS + 1))
    assert [value for _, _, value in loss] == [5 / step for step in range(1, STEPS + 1)]
    journal = plan.cells[0].journals[0]
    times = [round(json.loads(line)["time"] * 1000) for line in journal.read_text().splitlines()]
    assert [time for _, time, _ in loss] == times
    assert done["latest"]["train/loss"] == 5 / STEPS
    assert done["latest"]["train/tokens"] == STEPS * 4096

    assert done["latest"]["likelihood/ar_bits_per_byte"] == 2.5
    assert done["latest"]["interval/likelihood/ar_bits_per_byte_ci_low"] == 2.4
    assert done["latest"]["interval/likelihood/ar_bits_per_byte_ci_high"] == 2.6
    assert not any("joules" in name for name in done["latest"])
    assert (
        "Not measured: continuation/threshold/joules_per_token"
        in (done["tags"]["mlflow.note.content"])
    )

    assert len(done["params"]) == 150
    tags = done["tags"]
    assert tags["config_hash"] == "ab12"
    assert tags["mlflow.source.git.commit"] == "0" * 40
    assert tags["mlflow.runName"] == "fixed seed 0"
    assert tags["mlflow.parentRunId"] == "grid"
    assert tags["abf.attempt_states"] == "1 FAILED, 2 COMPLETED"
    assert tags["abf.charged"] == "train, score"
    assert tags["abf.energy_source"] == "not measured"
    assert done["latest"]["cost/attempts"] == 3
    assert done["latest"]["cost/failed_attempts"] == 1
    assert done["latest"]["cost/core_hours"] == pytest.approx(3 * 2 * 60 / 3600)
    assert not {"cost/node_hours", "cost/gpu_hours", "cost/energy_kwh"} & done["latest"].keys()
    assert tags["abf.job_ids"] == "train-fixed-0-1 train-fixed-0-2 score-fixed-0-1"
    assert int(tags[f"{BOOKKEEPING}journal.train.offset"]) == journal.stat().st_size
    assert tags["attempts.train"] == "FAILED 60.0 s (boom), COMPLETED 60.0 s"

    assert done["info"] == ("FINISHED", 1_700_000_000_000, 1_700_000_460_000)
    assert failed["info"][0] == "FAILED"
    assert grid["info"][0] == "FAILED"
    assert list(grid["files"]) == ["attempts.csv", "figures/curve.svg"]
    assert "3 cells, 1 not begun" in grid["tags"]["mlflow.note.content"]
    assert done["inputs"] == [
        ("packed-fixed", ("ee" * 32)[:36], [("mlflow.data.context", "train")])
    ]
    assert sorted(done["files"]) == [
        "attempts.csv",
        "figures/curve.svg",
        "references.json",
        "scores.csv",
    ]
    (reference,) = json.loads(done["files"]["references.json"])
    assert reference["sha256"] == "ff" * 32
    assert reference["bytes"] == 123
    assert len(done["files"]["attempts.csv"].splitlines()) == 1 + 3


def test_twice_is_once_and_a_finished_cell_is_completed_later(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    results = tmp_path / "results"
    plan = make_plan(results, make_cell(results, "a", finished=False))
    store.ingest(plan)
    first = store.tables()
    assert store.ingest(plan)["points"] == 0
    assert store.tables() == first

    # The same cell, finished; a second cell joins the grid and reuses the parent.
    plan = make_plan(results, make_cell(results, "a"), make_cell(results, "b"))
    assert store.ingest(plan)["runs_created"] == 1
    content = store.content()
    assert content["a"]["info"][0] == "FINISHED"
    assert content["grid"]["info"][0] == "FINISHED"


def test_a_grid_that_nobody_drives_has_failed_until_somebody_does(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    done = make_cell(tmp_path / "results", "a")
    waiting = replace(done, run="b", stage_dirs={"train": tmp_path / "results" / "train" / "b"})
    for driven, status in ((True, "RUNNING"), (False, "FAILED"), (True, "RUNNING")):
        store.ingest(make_plan(tmp_path / "results", done, waiting, driven=driven))
        content = store.content()
        assert content["grid"]["info"][0] == status
        assert content["a"]["info"][0] == "FINISHED"


def test_cut_and_replayed_journal_adds_no_step_twice(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    cell = make_cell(tmp_path / "results", "a")
    plan = make_plan(tmp_path / "results", cell)
    store.ingest(plan)
    before = store.content()["a"]["metrics"]
    with Journal(cell.journals[0]) as journal:
        journal.cut(STEPS - 15)
    store.ingest(plan)
    assert store.content()["a"]["metrics"] == before
    with Journal(cell.journals[0]) as journal:
        write_steps(journal, STEPS - 14, STEPS + 10)
    store.ingest(plan)
    metrics = store.content()["a"]["metrics"]
    assert [step for step, _, _ in metrics["train/loss"]] == list(range(1, STEPS + 11))
    assert metrics["train/loss"][:STEPS] == before["train/loss"]


def test_both_writers_give_the_same_store(tmp_path: Path, template: Path):
    points = [
        *(Point("loss", 1 / step, 1000 + step, step) for step in range(1, 2000)),
        Point("late", 1.0, 50, 3),
        Point("late", 2.0, 40, 3),
        Point("nan", math.nan, 1, 0),
        Point("inf", -math.inf, 1, 0),
    ]
    found = []
    for kind in ("sqlite", "client"):
        store = Store(tmp_path / kind, template)
        client = MlflowClient(tracking_uri=store.uri)
        experiment = client.create_experiment("study", artifact_location="file:///nowhere")
        run = client.create_run(experiment, start_time=1, run_name="a").info.run_id
        path = tmp_path / kind / "mlflow.db"
        writer = SqliteWriter(path) if kind == "sqlite" else ClientWriter(client)
        writer.write(run, points, {"a": "1"})
        writer.write(run, [*points[:10], Point("late", 9.0, 60, 2)], {"a": "2", "b": "3"})
        writer.close()
        content = store.content()["grid"]
        content["latest"]["nan"] = repr(content["latest"]["nan"])
        content["metrics"]["nan"] = repr(content["metrics"]["nan"])
        found.append(content)
    assert found[0] == found[1]
    assert found[0]["latest"]["late"] == 1.0


def test_saved_views_are_what_the_addresses_name(tmp_path: Path, template: Path):
    """Seen in a browser: the names of columns and keys are MLflow's own."""
    address = "/#/experiments/3/runs?workflowType=machine_learning&viewStateShareKey="
    assert runs_page("3") == f"{address}abf-cells"
    assert runs_page("3", GRIDS) == f"{address}abf-grids"
    store = Store(tmp_path / "store", template)
    results = tmp_path / "results"
    counts = store.ingest(make_plan(results, make_cell(results, "a")))
    client = MlflowClient(tracking_uri=store.uri)
    experiment = counts["experiment"]
    tags = client.get_experiment(experiment).tags
    assert tags == experiment_tags()
    view = json.loads(tags["mlflow.sharedViewState.abf-cells"])
    shown = json.loads(view["state"])["selectedColumns"]
    metrics = [name.split("`")[1] for name in shown if name.startswith("metrics.")]
    cell = store.content()["a"]
    assert {name for name in metrics if name in cell["latest"]} == {
        "cost/attempts", "cost/failed_attempts", "cost/core_hours", "train/loss",
    }  # fmt: skip
    assert "abf.attempt_states" in cell["tags"]
    # A store from before the views gets them.
    client.delete_experiment_tag(experiment, "mlflow.sharedViewState.abf-cells")
    store.ingest(make_plan(results, make_cell(results, "a")))
    assert client.get_experiment(experiment).tags == tags
