"""A study with failed, requeued and shared attempts, and the ingest's plan of it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from abf.artifacts import LEDGER, read_table
from abf.cluster.config import NodeConfig
from abf.cluster.history import Attempt
from abf.ledger.build import build_ledger
from abf.ledger.slurm import RECORDS, scheduled_rows
from abf.track.attempts import ATTEMPTS
from abf.track.mlflow_records import Cell, IngestPlan
from tests.track.cells import make_cell, write_attempts

START = 1_700_000_000
JOB = "4711"
PLACES = (
    "fetch/stdlib", "base/pretrain", "train/a", "train/b", "train/common",
    *(f"score/{run}" for run in "abcd"), "decode/c/task.half", "decode/d/task.half",
)  # fmt: skip


def job(number: int, place: str, **changes: Any) -> Attempt:
    """A record of the scheduler's: a full node for an hour, submitted at hour `number`."""
    submit = START + 7200 * number
    values = {
        "cluster": "leonardo", "job_id": JOB, "name": "abf", "account": "euhpc",
        "comment": f"abf {place.replace('/', ' ', 1)}", "submit": submit, "start": submit + 60,
        "end": submit + 3660, "elapsed_s": 3600, "limit_min": 60, "state": "COMPLETED",
        "reason": "", "exit_code": "0:0", "billing": 32.0, "nodes": 1, "gpus": 4,
        "requested_billing": 32.0, "energy_j": 7.2e6,
    }  # fmt: skip
    return Attempt(**(values | changes))


def write_jobs(results: Path, *jobs: Attempt) -> None:
    path = results / RECORDS
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(vars(record)) + "\n" for record in jobs))


def own_records(directory: Path, job_id: str, *states: str) -> None:
    """What the attempts of a job wrote down themselves, on one node after the other."""
    write_attempts(directory, list(states), start=START + 60)
    lines = [json.loads(line) for line in (directory / ATTEMPTS).read_text().splitlines()]
    for line in lines:
        line |= {"job_id": job_id, "host": f"lrdn000{line['attempt']}"}
    (directory / ATTEMPTS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def plan_of(results: Path, *cells: Cell) -> IngestPlan:
    """The plan of an ingest after the ledger stage."""
    scheduled = scheduled_rows(results, PLACES, node=NodeConfig())
    directories = [results / place for place in PLACES]
    build_ledger(results, directories, results / "ledger" / "study", scheduled=scheduled)
    rows = read_table(results / "ledger" / "study" / "ledger.parquet", LEDGER).to_pylist()
    return IngestPlan("study", "grid", cells, results, rows)


def measured_decode(directory: Path) -> None:
    """Let every closed attempt have used 1.8 MJ."""
    lines = [json.loads(line) for line in (directory / ATTEMPTS).read_text().splitlines()]
    for line in lines:
        line["rule"] = "decode"
        if line["state"] != "RUNNING":
            line |= {"energy_j": 1.8e6, "energy_source": "rapl:package"}
    (directory / ATTEMPTS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_study(results: Path) -> IngestPlan:
    """Cell a ran on a cluster and was requeued, b failed twice, c and d share their training."""
    write_attempts(results / "fetch" / "stdlib", ["COMPLETED"])
    write_attempts(results / "base" / "pretrain", ["FAILED", "COMPLETED"])
    cells = [make_cell(results, run) for run in "ab"]
    own_records(results / "train" / "a", JOB, "INTERRUPTED", "COMPLETED")
    write_attempts(results / "train" / "b", ["FAILED", "KILLED", "COMPLETED"])
    common = results / "train" / "common"
    write_attempts(common, ["FAILED", "COMPLETED"])
    (common / "manifest.json").write_text("{}")
    for run in "cd":
        cell = make_cell(results, run)
        decode = results / "decode" / run / "task.half"
        write_attempts(decode, ["COMPLETED"], start=START + 300)
        measured_decode(decode)
        (decode / "manifest.json").write_text("{}")
        places = {"train": common, "decode.half": decode, "score": cell.stage_dirs["score"]}
        cells.append(replace(cell, stage_dirs=places))
    write_jobs(
        results,
        job(1, "train/a", state="REQUEUED", elapsed_s=1800),
        job(2, "train/a", energy_j=None),
        job(0, "train/other", job_id="9"),
    )
    for run in "cd":  # their own trainings never were
        (results / "train" / run / ATTEMPTS).unlink()
    return plan_of(results, *cells)
