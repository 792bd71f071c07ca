"""State of runs and their attempts, from ledger rows and from what attempts wrote themselves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from abf.stages import MANIFEST
from abf.track.mlflow_costs import ALIVE, Row, by_place, ordered, owners
from abf.track.mlflow_points import milliseconds
from abf.track.outcomes import attempt_outcomes


@dataclass(frozen=True)
class Progress:
    """What the attempts at some stage directories amount to."""

    status: str
    """MLflow's run status: FINISHED, RUNNING or FAILED."""
    start: int
    """Milliseconds; first attempt."""
    end: int
    """Milliseconds; last sign of life of the last attempt."""
    rows: Sequence[Row]
    """Ledger row of every attempt, in order of time; `stage` is the name of its directory, `host`
    where it ran (several are listed if nobody knows which), `charged_to` is `run` or `grid`."""

    def charged(self, to: str) -> list[Row]:
        """Rows that are charged to the `run` itself, or to the `grid`."""
        return [row for row in self.rows if row["charged_to"] == to]


def by_stage(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of a `Progress` by the name of their directory."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row["stage"], []).append(row)
    return found


def progress(
    stage_dirs: Mapping[str, Path],
    rows: Mapping[str, Sequence[Row]],
    charged_to: Mapping[str, str],
    *,
    driven: bool,
) -> Progress | None:
    """Attempts and state of a run; None when nothing of it was ever attempted.

    Args:
        stage_dirs: directories by name.
        rows: ledger rows of each, by the same names.
        charged_to: `run` or `grid`, by the same names.
        driven: whether somebody will go on with what is unfinished; else it has failed.
    """
    found: list[Row] = []
    spans: list[tuple[float, float]] = []
    finished, failed, alive = True, False, False
    for stage, directory in stage_dirs.items():
        here, outcomes = rows.get(stage, ()), attempt_outcomes(directory)
        # What a scheduler ended before our code ran has no record of ours.
        spans += [(o["start"], o["end"]) for o in outcomes] or [_span(row) for row in here]
        extra = {"stage": stage, "charged_to": charged_to[stage]}
        found += [
            {**row, **extra, "host": host}
            for row, host in zip(here, _hosts(here, outcomes), strict=True)
        ]
        if here:
            alive |= here[-1]["state"] in ALIVE
        if not (directory / MANIFEST).exists():
            finished = False
            failed |= bool(here) and here[-1]["state"] not in ALIVE | {"COMPLETED"}
    if not spans:
        return None
    goes_on = alive or (driven and not failed)
    return Progress(
        status="FINISHED" if finished else "RUNNING" if goes_on else "FAILED",
        start=milliseconds(min(start for start, _ in spans)),
        end=milliseconds(max(end for _, end in spans)),
        rows=ordered(found),
    )


def _span(row: Row) -> tuple[float, float]:
    start = datetime.fromisoformat(row["submit_time"]).timestamp()
    return start, start + row["elapsed_s"]


def _hosts(rows: Sequence[Row], outcomes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Where each attempt ran, from the records that it wrote itself."""
    by_job: dict[str, list[str]] = {}
    for outcome in outcomes:
        by_job.setdefault(str(outcome["job_id"]), []).append(outcome["host"])
    hosts = []
    for row in rows:
        known = by_job.get(row["job_id"], [])
        attempts = [other for other in rows if other["job_id"] == row["job_id"]]
        # One of a job's attempts may have ended before it wrote a record: which one is not known.
        sure = len(known) == len(attempts)
        hosts.append(known[attempts.index(row)] if sure else " ".join(dict.fromkeys(known)))
    return hosts


def charge(
    results: Path,
    rows: Iterable[Row],
    stage_dirs: Mapping[str, Mapping[str, Path]],
    *,
    driven: bool = True,
) -> tuple[dict[str, Progress | None], Progress | None]:
    """Attempts and state of every cell, and of what is charged to none of them alone.

    Args:
        results: folder that holds all stage directories.
        rows: the study's ledger.
        stage_dirs: directories by name, by cell.
        driven: see `progress`.
    """
    here = by_place(rows)
    places = {
        cell: {stage: found.relative_to(results).as_posix() for stage, found in directories.items()}
        for cell, directories in stage_dirs.items()
    }
    owned = owners({cell: of_cell.values() for cell, of_cell in places.items()})
    cells = {
        cell: progress(
            directories,
            {stage: here.get(place, []) for stage, place in places[cell].items()},
            {stage: "run" if place in owned else "grid" for stage, place in places[cell].items()},
            driven=driven,
        )
        for cell, directories in stage_dirs.items()
    }
    shared = {place: found for place, found in here.items() if place not in owned}
    directories = {place: results / place for place in shared}
    return cells, progress(directories, shared, dict.fromkeys(shared, "grid"), driven=driven)
