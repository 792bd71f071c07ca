"""Tracking: what a journal record costs, and journal + ingest against `log_metric` on sqlite.

Wall-clock on this disk, everything in one process, the two ways interleaved. That every value is in
the store is asserted in the same run.
"""

from __future__ import annotations

import json
import os
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from abf.track.attempts import ATTEMPTS
from abf.track.journal import Journal
from abf.track.mlflow_records import Cell, IngestPlan
from abf.track.mlflow_store import ingest
from benchmarks.statistics import Row, ratio_row

METRICS = 9
"""Metrics a step; the journal's token count makes ten points in the store."""


def run(quick: bool = False) -> list[Row]:
    """Rows of the benchmark table."""
    rounds, steps, calls = (3, 300, 40) if quick else (11, 2000, 200)
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-track-") as folder:
        root = Path(folder)
        journal = _journal_costs(root / "alone", rounds, steps)
        call_s, point_s = _costs(root, rounds, steps, calls)
    detail = f"{METRICS} metrics a step, {steps} steps, {rounds} rounds, wall-clock"
    return [
        _row("journal record of a step", journal, detail),
        _row("log_metric on sqlite, a point", call_s, f"{calls} calls a round, wall-clock"),
        _row("journal and ingest, a point", point_s, detail),
        ratio_row(
            "log_metric / (journal and ingest), a point",
            call_s,
            point_s,
            f"{detail}; a new run with parameters and tags each; goal at least 80",
        ),
    ]


def _row(figure: str, seconds: Sequence[float], detail: str) -> Row:
    times = np.asarray(seconds) * 1e6
    picks = np.random.default_rng(0).integers(len(times), size=(2000, len(times)))
    low, high = np.quantile(np.median(times[picks], axis=1), [0.025, 0.975])
    return Row(
        figure=figure,
        value=float(np.median(times)),
        low=float(low),
        high=float(high),
        unit="us",
        detail=detail,
    )


def _journal_costs(root: Path, rounds: int, steps: int) -> list[float]:
    """[rounds] seconds a record."""
    return [_write(root / str(i) / "journal.jsonl", steps) / steps for i in range(rounds)]


def _write(path: Path, steps: int) -> float:
    """Seconds for `steps` records."""
    names = [f"metric/{i}" for i in range(METRICS)]
    with Journal(path) as journal:
        began = time.perf_counter()
        for step in range(1, steps + 1):
            values = {name: (step + i) / 7 for i, name in enumerate(names)}
            journal.metrics(step, 4096 * step, values, 0.1 * step)
        return time.perf_counter() - began


def _costs(root: Path, rounds: int, steps: int, calls: int) -> tuple[list[float], list[float]]:
    """[rounds] seconds a call of log_metric, and seconds a point of journal and ingest."""
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    uri = f"sqlite:///{root / 'mlflow.db'}"
    # Creating MLflow's tables takes seconds once in a project's life and is nobody's step.
    nothing = IngestPlan("bench", "none", [], root)
    ingest(nothing, tracking_uri=uri, artifact_root=root / "artifacts")
    client = MlflowClient(tracking_uri=uri)
    experiment = client.create_experiment("calls", artifact_location=(root / "calls").as_uri())
    call_s, point_s = [], []
    for number in range(rounds):
        one = client.create_run(experiment).info.run_id
        call_s.append(_seconds(lambda one=one: _calls(client, one, calls)) / calls)
        cell = _cell(root, number)
        written = _write(cell.journals[0], steps)
        plan = IngestPlan("bench", f"grid{number}", [cell], root)
        ingested = _seconds(
            lambda plan=plan: ingest(plan, tracking_uri=uri, artifact_root=root / "artifacts")
        )
        points = steps * (METRICS + 1)
        point_s.append((written + ingested) / points)
        _check(client, number, steps)
    return call_s, point_s


def _seconds(work: Callable[[], Any]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def _calls(client: Any, run_id: str, calls: int) -> None:
    for i in range(calls):
        client.log_metric(run_id, f"metric/{i % METRICS}", i / 7, step=i // METRICS)


def _cell(root: Path, number: int) -> Cell:
    directory = root / "train" / f"cell{number}"
    directory.mkdir(parents=True)
    record = {
        "attempt": 1,
        "job_id": "1",
        "host": socket.gethostname(),
        "rule": "train",
        "run": directory.name,
        "cores": 1,
        "gpus": 0,
        "start": 1.7e9,
        "end": 1.7e9 + 60,
        "elapsed_s": 60.0,
        "state": "COMPLETED",
        "reason": "",
    }
    (directory / ATTEMPTS).write_text(json.dumps(record) + "\n")
    return Cell(
        run=directory.name,
        name=directory.name,
        params={f"train.key{i}": str(i) for i in range(60)},
        tags={"config_hash": "0" * 8},
        stage_dirs={"train": directory},
        journals=[directory / "journal.jsonl"],
    )


def _check(client: Any, number: int, steps: int) -> None:
    experiment = client.get_experiment_by_name("bench")
    (found,) = [
        r
        for r in client.search_runs([experiment.experiment_id])
        if r.data.tags.get("abf.run") == f"cell{number}"
    ]
    history = client.get_metric_history(found.info.run_id, "train/metric/3")
    assert [m.step for m in history] == list(range(1, steps + 1))
    assert all(m.value == (m.step + 3) / 7 for m in history)
