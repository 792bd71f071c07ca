"""MLflow after the workflow: costs that are the ledger's, samples of the system, nothing twice."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

from abf.artifacts import LEDGER, read_table
from tests.workflow.conftest import RESULTS, Project

STAGES = ("train", "decode", "score")
COSTS = "SELECT r.name, m.key, m.value FROM latest_metrics m JOIN runs r USING (run_uuid)"


def test_costs_are_the_ledgers_and_a_second_ingest_changes_nothing(copy: Project) -> None:
    command = [sys.executable, "-m", "abf.cli", "mlflow", f"{RESULTS}/mlflow/micro"]

    def ingest() -> None:
        done = subprocess.run(
            command, cwd=copy.folder, env={"PYTHONPATH": str(Path(__file__).parents[2])},
            capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr

    store = copy.results / "mlflow" / "mlflow.db"
    ingest()
    before = store.read_bytes()
    with contextlib.closing(sqlite3.connect(store)) as connection:
        found = {(run, key): value for run, key, value in connection.execute(COSTS)}
    ingest()
    assert store.read_bytes() == before

    rows = read_table(copy.results / "ledger/micro/ledger.parquet", LEDGER).to_pylist()
    assert found["grid", "cost/attempts"] == len(rows) == 17
    total = sum(row["core_hours"] for row in rows)
    assert found["grid", "cost/core_hours"] == pytest.approx(total)
    for cell in ("fixed-s0", "sentence-s0"):
        own = [row for row in rows if cell in row["run"] and row["rule"] in STAGES]
        assert found[cell, "cost/attempts"] == len(own) == 3
        hours = sum(row["core_hours"] for row in own)
        assert found[cell, "cost/core_hours"] == pytest.approx(hours)
        assert 0 < found[cell, "system/process_memory_usage_megabytes"] < 1e6
    # Both cells ran where nothing counts node-hours: absent, not 0.
    assert not [key for _, key in found if key in ("cost/node_hours", "cost/gpu_hours")]
