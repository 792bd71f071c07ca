"""Cells of a made-up study and an MLflow store whose whole content can be compared."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from pathlib import Path
from typing import Any

import pyarrow as pa

from abf.artifacts import SCORES, write_table
from abf.cluster.config import NodeConfig
from abf.ledger.slurm import rows_so_far
from abf.track.attempts import ATTEMPTS
from abf.track.journal import Journal
from abf.track.mlflow_records import Cell, DatasetRef, IngestPlan
from abf.track.mlflow_store import ingest
from tests.attempts import closing, record, write

STEPS = 40


def write_attempts(directory: Path, states: list[str], start: float = 1.7e9) -> None:
    """Attempts of 60 s each, one after the other, with these end states."""
    lines = []
    for number, state in enumerate(states, start=1):
        opened = record(directory, number, start)
        lines += [opened, opened | closing(start, 60.0, state, "boom" * (state == "FAILED"))]
        start += 100
    write(directory, *lines)


def write_steps(journal: Journal, first: int, last: int) -> None:
    for step in range(first, last + 1):
        journal.metrics(step, step * 4096, {"loss": 5 / step, "lr": 1e-3 * step}, step * 0.1)


def write_scores(directory: Path, run: str) -> None:
    common = {"run": run, "arm": "fixed", "seed": 0, "task_version": 1, "note": ""}
    rows = [
        common
        | {
            "task": "likelihood",
            "decoder": "",
            "metric": "ar_bits_per_byte",
            "unit": "bits/byte",
            "value": 2.5,
            "ci_low": 2.4,
            "ci_high": 2.6,
            "interval": "documents",
            "n": 7,
        },
        common
        | {
            "task": "continuation",
            "decoder": "threshold",
            "metric": "joules_per_token",
            "unit": "J",
            "value": None,
            "ci_low": None,
            "ci_high": None,
            "interval": "none",
            "n": 0,
        },
    ]
    table = pa.Table.from_pylist(rows, schema=SCORES)
    write_table(directory / "scores.parquet", table, SCORES)
    os.utime(directory / "scores.parquet", (1.7e9 + 500, 1.7e9 + 500))
    (directory / "manifest.json").write_text("{}")


def make_cell(root: Path, run: str, *, finished: bool = True) -> Cell:
    train, score = root / "train" / run, root / "score" / run
    write_attempts(train, ["FAILED", "COMPLETED"] if finished else ["FAILED"])
    with Journal(train / "journal.jsonl") as journal:
        write_steps(journal, 1, STEPS)
    if finished:
        (train / "manifest.json").write_text("{}")
        write_attempts(score, ["COMPLETED"], start=1.7e9 + 400)
        write_scores(score, run)
    figure = root / "curve.svg"
    figure.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return Cell(
        run=run,
        name="fixed seed 0",
        params={f"train.key{i}": str(i) for i in range(150)},
        tags={"config_hash": "ab12", "git_sha": "0" * 40, "arm": "fixed", "seed": "0"},
        stage_dirs={"train": train, "score": score},
        journals=[train / "journal.jsonl"],
        figures=[figure],
        artifacts=[("model", root / "model.safetensors", "ff" * 32, 123)],
        datasets=[DatasetRef("packed-fixed", root / "packed", "ee" * 32)],
    )


def rows_of(results: Path) -> list[dict[str, Any]]:
    """Ledger rows of everything that was ever attempted below a folder."""
    places = [p.parent.relative_to(results).as_posix() for p in results.rglob(ATTEMPTS)]
    return rows_so_far(results, sorted(places), node=NodeConfig(), trouble=[])


def make_plan(results: Path, *cells: Cell, **more: Any) -> IngestPlan:
    return IngestPlan("study", "grid", cells, results, rows_of(results), **more)


class Store:
    def __init__(self, root: Path, template: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        self.path = root / "mlflow.db"
        self.path.write_bytes(template.read_bytes())
        self.uri = f"sqlite:///{self.path}"
        self.artifacts = root / "artifacts"

    def ingest(self, plan: IngestPlan) -> dict[str, Any]:
        return ingest(plan, tracking_uri=self.uri, artifact_root=self.artifacts)

    def tables(self) -> list[str]:
        """Every row of every table, as SQL."""
        with contextlib.closing(sqlite3.connect(self.path)) as connection:
            return list(connection.iterdump())

    def content(self) -> dict[str, Any]:
        """Everything in the store but what differs by chance: run ids and their folders."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        experiment = client.get_experiment_by_name("study")
        assert experiment is not None
        runs = list(client.search_runs([experiment.experiment_id]))
        names = {run.info.run_id: run.data.tags.get("abf.run", "grid") for run in runs}
        content = {}
        for run in runs:
            key = names[run.info.run_id]
            assert key not in content, "one run a cell"
            tags = dict(run.data.tags)
            if "mlflow.parentRunId" in tags:
                tags["mlflow.parentRunId"] = names[tags["mlflow.parentRunId"]]
            assert run.info.artifact_uri is not None
            assert run.inputs is not None
            folder = Path(run.info.artifact_uri.removeprefix("file://"))
            content[key] = {
                "info": (run.info.status, run.info.start_time, run.info.end_time),
                "params": dict(run.data.params),
                "tags": tags,
                "latest": dict(run.data.metrics),
                "metrics": {
                    name: sorted(
                        (m.step, m.timestamp, m.value)
                        for m in client.get_metric_history(run.info.run_id, name)
                    )
                    for name in run.data.metrics
                },
                "inputs": [
                    (i.dataset.name, i.dataset.digest, [(t.key, t.value) for t in i.tags])
                    for i in run.inputs.dataset_inputs
                ],
                "files": {
                    path.relative_to(folder).as_posix(): path.read_bytes()
                    for path in sorted(folder.rglob("*"))
                    if path.is_file()
                },
            }
        return content
