"""Costs in MLflow against the ledger: failed, requeued and shared attempts, each charged once."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from abf.artifacts import LEDGER, read_table
from abf.ledger.slurm import RECORDS
from abf.track.mlflow_costs import (
    NO_BREAK,
    cost_line,
    cost_table,
    energy_source,
    figures,
    has_failed,
    owners,
)
from abf.track.mlflow_records import Cell, IngestPlan
from tests.track.cells import Store, write_attempts
from tests.track.charged import JOB, job, plan_of, write_jobs, write_study

COSTS = {
    "cost/node_hours": "node_hours",
    "cost/gpu_hours": "gpu_hours",
    "cost/core_hours": "core_hours",
    "cost/energy_kwh": "energy_j",
}


@pytest.fixture
def study(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], IngestPlan]:
    monkeypatch.setenv("PATH", "/nowhere")  # this machine may have a scheduler of its own
    return lambda: write_study(tmp_path / "results")


def table_of(content: dict[str, Any]) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(content["files"]["attempts.csv"].decode())))


def note(content: dict[str, Any]) -> str:
    return content["tags"]["mlflow.note.content"].replace(NO_BREAK, "")


def test_shared_and_cells_add_up_to_the_ledger(
    tmp_path: Path, template: Path, study: Callable[[], IngestPlan]
):
    store, plan = Store(tmp_path / "store", template), study()
    store.ingest(plan)
    content = store.content()
    ledger = read_table(tmp_path / "results/ledger/study/ledger.parquet", LEDGER).to_pylist()
    parent, cells = content["grid"]["latest"], [content[run]["latest"] for run in "abcd"]
    shared = [row for row in table_of(content["grid"]) if row["cell"] == ""]
    for name, column in COSTS.items():
        scale = 3.6e6 if column == "energy_j" else 1.0
        total = sum(row[column] or 0.0 for row in ledger) / scale
        above = sum(float(row[column] or 0.0) for row in shared) / scale
        assert parent[name] == pytest.approx(total, rel=1e-12), name
        assert above + sum(cell.get(name, 0.0) for cell in cells) == pytest.approx(total), name
    assert parent["cost/attempts"] == len(ledger) == 1 + 2 + 2 + 3 + 2 + 4 + 2
    assert sum(c["cost/attempts"] for c in cells) + len(shared) == len(ledger)
    # b's two, a's requeue, the base model's, the shared training's.
    assert parent["cost/failed_attempts"] == 5
    assert sum(c["cost/failed_attempts"] for c in cells) == 3
    assert len(table_of(content["grid"])) == len(ledger)
    assert {row["stage"] for row in shared} == {"fetch/stdlib", "base/pretrain", "train/common"}
    assert "| base, shared | 2 | 1 |" in note(content["grid"])
    states = content["grid"]["tags"]["abf.attempt_states"]
    assert sorted(states.split(", ")) == ["1 KILLED", "1 REQUEUED", "11 COMPLETED", "3 FAILED"]


def test_a_requeued_job_is_one_run_with_two_attempts(
    tmp_path: Path, template: Path, study: Callable[[], IngestPlan]
):
    store = Store(tmp_path / "store", template)
    counts = store.ingest(study())
    assert counts["runs"] == 4
    run = store.content()["a"]
    assert run["info"][0] == "FINISHED"
    assert run["tags"]["abf.attempt_states"] == "2 COMPLETED, 1 REQUEUED"
    assert run["tags"]["attempts.train"] == "REQUEUED 1800.0 s, COMPLETED 3600.0 s"
    assert run["tags"]["abf.job_ids"].split()[-1] == JOB
    first, second = (row for row in table_of(run) if row["job_id"] == JOB)
    assert (first["state"], first["attempt"], first["host"]) == ("REQUEUED", "1", "lrdn0001")
    assert (second["state"], second["attempt"], second["host"]) == ("COMPLETED", "2", "lrdn0002")
    assert first["cluster"] == second["cluster"] == "leonardo"
    assert run["latest"]["cost/node_hours"] == pytest.approx(1.5)
    assert run["latest"]["cost/gpu_hours"] == pytest.approx(6.0)
    assert run["latest"]["cost/energy_kwh"] == pytest.approx(2.0)
    assert run["tags"]["abf.energy_source"] == "Slurm ConsumedEnergyRaw 1 of 3 attempts"
    # Scored on the spot: both kinds of hours, each in its own figure.
    assert run["latest"]["cost/core_hours"] == pytest.approx(2 * 60 / 3600)


def test_what_cells_share_is_said_and_not_charged_to_them(
    tmp_path: Path, template: Path, study: Callable[[], IngestPlan]
):
    store = Store(tmp_path / "store", template)
    store.ingest(study())
    content = store.content()
    for run in "cd":
        tags, latest = content[run]["tags"], content[run]["latest"]
        assert tags["abf.charged"] == "decode.half, score"
        assert tags["abf.attempt_states"] == "2 COMPLETED; shared: 1 FAILED, 1 COMPLETED"
        assert tags["attempts.train"] == "FAILED 60.0 s (boom), COMPLETED 60.0 s"
        assert "| train, shared: charged to the parent run | 2 | 1 |" in note(content[run])
        assert latest["cost/attempts"] == 2
        assert latest["cost/energy_kwh"] == pytest.approx(0.5)
        assert tags["abf.energy_source"] == "rapl:package 1 of 2 attempts"
        assert [row["charged_to"] for row in table_of(content[run])] == [
            "grid",
            "grid",
            "run",
            "run",
        ]
    assert "cost/energy_kwh" not in content["b"]["latest"]
    assert "cost/node_hours" not in content["b"]["latest"]
    assert content["b"]["tags"]["abf.energy_source"] == "not measured"


def test_twice_gives_the_same_tables(
    tmp_path: Path, template: Path, study: Callable[[], IngestPlan]
):
    store, plan = Store(tmp_path / "store", template), study()
    store.ingest(plan)
    before, content = store.path.read_bytes(), store.tables()
    assert store.ingest(plan)["points"] == 0
    assert store.tables() == content
    assert store.path.read_bytes() == before


def test_later_costs_replace_earlier_ones(
    tmp_path: Path, template: Path, study: Callable[[], IngestPlan]
):
    """The requeued job is ingested between its attempts, as it would be by a look at the UI."""
    store, plan = Store(tmp_path / "store", template), study()
    results = tmp_path / "results"
    records = (results / RECORDS).read_text()
    write_jobs(
        results,
        job(1, "train/a", state="REQUEUED", elapsed_s=1800),
        job(2, "train/a", state="PENDING", start=None, end=None, elapsed_s=0, billing=0.0, gpus=0),
    )
    (results / "train/a/manifest.json").unlink()
    store.ingest(plan_of(results, *plan.cells))
    run = store.content()["a"]
    assert run["info"][0] == "RUNNING"  # it waits in the queue, nothing has failed
    assert run["tags"]["abf.attempt_states"] == "1 COMPLETED, 1 REQUEUED, 1 PENDING"
    assert run["latest"]["cost/node_hours"] == 0.5
    assert run["latest"]["cost/failed_attempts"] == 1
    (results / "train/a/manifest.json").write_text("{}")
    (results / RECORDS).write_text(records)
    store.ingest(plan_of(results, *plan.cells))
    later, fresh = store.content(), Store(tmp_path / "fresh", template)
    assert [value for _, _, value in later["a"]["metrics"]["cost/node_hours"]] == [1.5]
    fresh.ingest(plan)
    assert later == fresh.content()


def test_a_tracking_server_shows_the_newest_costs(
    tmp_path: Path,
    template: Path,
    study: Callable[[], IngestPlan],
    monkeypatch: pytest.MonkeyPatch,
):
    monkeypatch.setattr("abf.track.mlflow_store.sqlite_path", lambda uri: None)
    store, plan = Store(tmp_path / "store", template), study()
    store.ingest(plan)
    content = store.tables()
    store.ingest(plan)
    assert store.tables() == content
    # A record that the site corrected: less than before.
    rows = [{**row, "node_hours": row["node_hours"] and 0.25} for row in plan.rows]
    store.ingest(replace(plan, rows=rows))
    run = store.content()["a"]
    assert run["latest"]["cost/node_hours"] == 0.5
    assert [(step, value) for step, _, value in run["metrics"]["cost/node_hours"]] == [
        (0, 1.5),
        (1, 0.5),
    ]


def test_a_study_that_fails_before_any_cell_shows_its_grid(
    tmp_path: Path, template: Path, study: Callable[[], IngestPlan]
):
    results = tmp_path / "results"
    write_attempts(results / "fetch" / "stdlib", ["COMPLETED"])
    (results / "fetch/stdlib/manifest.json").write_text("{}")
    write_attempts(results / "base" / "pretrain", ["FAILED"])
    cell = Cell("a", "a", {}, {}, {"train": results / "train" / "a"})
    store = Store(tmp_path / "store", template)
    counts = store.ingest(plan_of(results, cell))
    assert (counts["runs"], counts["waiting"]) == (0, 1)
    content = store.content()
    assert list(content) == ["grid"]
    assert content["grid"]["info"][0] == "FAILED"
    assert (
        "- **base/pretrain** FAILED after 60.0 s: boom"
        in (content["grid"]["tags"]["mlflow.note.content"])
    )
    assert content["grid"]["latest"]["cost/core_hours"] == pytest.approx(2 * 2 * 60 / 3600)


def row(state: str = "COMPLETED", **changes: Any) -> dict[str, Any]:
    nothing = dict.fromkeys(("node_hours", "gpu_hours", "core_hours", "energy_j"))
    return {"state": state, "energy_source": "", **nothing, **changes}


def test_figures_of_nothing_are_absent() -> None:
    assert figures([]) == {"cost/attempts": 0, "cost/failed_attempts": 0}
    assert figures([row(core_hours=0.0)])["cost/core_hours"] == 0  # measured, and nothing
    assert energy_source([]) == "not measured"
    assert cost_line([row(core_hours=0.5), row("KILLED", core_hours=1.0)]) == (
        "**2 attempts** (1 COMPLETED, 1 KILLED): 1.5 core-hours, energy: not measured"
    )
    table = cost_table({"train": [row(energy_j=3.6e6)]}, {})
    assert [line.replace(NO_BREAK, "") for line in table] == [
        "| stage | attempts | not completed | kWh |",
        "|:--|--:|--:|--:|",
        "| train | 1 | 0 | 1 |",
        "| **sum** | 1 | 0 | 1 |",
    ]


def test_what_counts_as_failed() -> None:
    failed = ("FAILED", "KILLED", "INTERRUPTED", "REQUEUED", "NODE_FAIL", "TIMEOUT", "CANCELLED")
    assert all(has_failed(row(state)) for state in failed)
    assert not any(has_failed(row(state)) for state in ("COMPLETED", "RUNNING", "PENDING"))


def test_owner_is_the_only_user() -> None:
    cells = {"a": ["train/x", "score/a"], "b": ["train/x", "score/b", "score/b"]}
    assert owners(cells) == {"score/a": "a", "score/b": "b"}
