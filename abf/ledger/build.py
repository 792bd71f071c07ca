"""The ledger: one row per job attempt, from attempt records and a scheduler's records.

Hours are wall-clock times what was reserved. A local attempt has core_hours = cores * elapsed_s /
3600 and no node_hours; a scheduled one has node_hours and gpu_hours, and no hours at all before the
scheduler has a record of it. Energy is joules.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa

from abf.artifacts import LEDGER, stage_dir, write_table
from abf.stages import FREE
from abf.track.attempts import is_schedulers
from abf.track.outcomes import attempt_outcomes

CLUSTER = "local"
UNRECORDED = "scheduler"
"""Cluster of an attempt by a scheduler's job of which the scheduler has no record yet."""
NOT_MEASURED = "not measured"


def build_ledger(
    results: Path,
    stage_dirs: Sequence[Path],
    out: Path,
    *,
    scheduled: Sequence[Mapping[str, Any]] = (),
) -> dict[str, Any]:
    """Write `out`/ledger.parquet (schema LEDGER), one row per attempt, failed ones included.

    Args:
        results: folder that holds the stage directories.
        stage_dirs: directories to charge for; one that is relative lies below `results`, one that
            was never attempted adds nothing, one named twice is charged once.
        out: staging directory.
        scheduled: rows from a scheduler's records (`abf.ledger.slurm`); what those jobs wrote down
            themselves is left out, so that nothing is charged twice.

    Returns:
        counts: attempts, failed, jobs, core_hours, node_hours.

    Raises:
        ArtifactError: a line of `attempts.jsonl` is no record; names file, line and fault.
    """
    directories = dict.fromkeys(_below(results, stage_dir(path)) for path in stage_dirs)
    own = [row for path in directories for row in ledger_rows(path, run=_key(results, path))]
    rows = with_scheduled(own, scheduled)
    rows.sort(key=lambda r: (r["submit_time"], r["rule"], r["run"], r["attempt"], r["job_id"]))
    write_table(out / "ledger.parquet", pa.Table.from_pylist(rows, schema=LEDGER), LEDGER)
    return {
        "attempts": len(rows),
        "failed": sum(row["state"] not in ("COMPLETED", "RUNNING") for row in rows),
        "jobs": len({row["job_id"] for row in rows}),
        "core_hours": sum(row["core_hours"] or 0.0 for row in rows),
        "node_hours": sum(row["node_hours"] or 0.0 for row in rows),
    }


def with_scheduled(
    own: Iterable[Mapping[str, Any]], scheduled: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Rows that attempts wrote down and rows of the scheduler's, each job once: as the latter."""
    jobs = {row["job_id"] for row in scheduled}
    return [*(dict(row) for row in own if row["job_id"] not in jobs), *map(dict, scheduled)]


def _below(results: Path, directory: Path) -> Path:
    return directory if directory.is_relative_to(results) else results / directory


def _key(results: Path, directory: Path) -> str:
    """`{key}` of `results/{stage}/{key}`; a key may have parts (`{run}/{task}.{decoder}`)."""
    parts = directory.relative_to(results).parts if directory.is_relative_to(results) else ()
    return "/".join(parts[1:]) or directory.name


def ledger_rows(directory: Path, *, run: str) -> list[dict[str, Any]]:
    """Rows (schema LEDGER) of one stage directory's attempts; `run` is its key."""
    return [_row(outcome) | {"run": run} for outcome in attempt_outcomes(directory)]


def _row(outcome: Mapping[str, Any]) -> dict[str, Any]:
    energy, job_id = outcome.get("energy_j"), str(outcome["job_id"])
    # Its hours are the scheduler's to tell: node-hours, of more than this process was given. What a
    # driver that is itself a job does on the side has the driver's id and is no job.
    scheduled = is_schedulers(job_id) and outcome["rule"] not in FREE
    start = datetime.fromtimestamp(outcome["start"], UTC)
    return {
        "cluster": UNRECORDED if scheduled else CLUSTER,
        "job_id": job_id,
        "submit_time": start.isoformat(timespec="milliseconds"),
        "attempt": outcome["attempt"],
        "rule": outcome["rule"],
        "state": outcome["state"],
        "reason": outcome["reason"],
        "nodes": 0,
        "gpus": outcome["gpus"],
        "elapsed_s": outcome["elapsed_s"],
        "node_hours": None,
        "gpu_hours": None,
        "core_hours": None if scheduled else outcome["cores"] * outcome["elapsed_s"] / 3600,
        "energy_j": energy,
        "energy_source": outcome.get("energy_source") or (NOT_MEASURED if energy is None else ""),
    }
