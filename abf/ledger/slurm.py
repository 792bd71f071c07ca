"""The scheduler's records of a study: which of them are its jobs, kept beyond the site's memory.

node_hours = elapsed_s / 3600 * billing / billing of a full node (32 on Leonardo), so that a quarter
of a node is charged as one. Records are merged into `{results}/.driver/records.jsonl` by cluster,
job id and submit time: a site forgets old jobs, the ledger does not.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from abf.cluster import slurm
from abf.cluster.config import NodeConfig
from abf.cluster.history import Attempt, history
from abf.cluster.jobs import Known, by_comment, by_id, job_record
from abf.cluster.limits import LIMITS
from abf.errors import ArtifactError, ClusterError
from abf.files import atomic_path
from abf.ledger.build import ledger_rows, with_scheduled
from abf.track.attempts import read_attempts

RECORDS = Path(".driver", "records.jsonl")
Records = dict[tuple[str, str, int], Attempt]
"""By `Attempt.key`: cluster, job id, time of submission."""
OVERLAP_S = 3 * 86_400
"""Records may be written or change this long after a job's submission was first seen."""


def scheduled_rows(
    results: Path, places: Sequence[str], *, node: NodeConfig
) -> list[dict[str, Any]]:
    """Ledger rows of a study's jobs; none where no scheduler ever worked on it.

    Args:
        places: `{stage}/{key}` of the study's directories.

    Raises:
        ClusterError: the accounting does not answer.
    """
    if was_scheduled(results, places):
        records = fresh_records(results, _place_of_id(results, places))
        store_records(results, records)
    else:
        records = kept_records(results)
    return slurm_rows(records.values(), places, results, full_billing=node.billing)


def rows_so_far(
    results: Path, places: Sequence[str], *, node: NodeConfig, trouble: list[str]
) -> list[dict[str, Any]]:
    """Ledger rows of these places as of now, whether or not their study has a ledger yet.

    The scheduler is asked for what the kept records lack; unlike the ledger, this keeps nothing.

    Args:
        trouble: gets a line when the accounting does not answer; kept records must then do.
    """
    records = kept_records(results)
    if was_scheduled(results, places):
        try:
            records = fresh_records(results, _place_of_id(results, places))
        except ClusterError as error:
            trouble.append(f"node-hours are as of the last ledger: {str(error).splitlines()[0]}")
    scheduled = slurm_rows(records.values(), places, results, full_billing=node.billing)
    own = (
        row for place in places for row in ledger_rows(results / place, run=place.partition("/")[2])
    )
    return with_scheduled(own, scheduled)


def was_scheduled(results: Path, places: Sequence[str]) -> bool:
    """Whether there is a scheduler to ask, and these results were ever driven on it."""
    if not slurm.available():
        return False
    # A job that ended before our code began has left nothing but its driver's file.
    driven = (results / ".driver" / LIMITS).exists()
    asked = any(job_record(results / place) for place in places)
    return driven or asked or bool(_place_of_id(results, places))


def _place_of_id(results: Path, places: Iterable[str]) -> dict[str, str]:
    """Place by the id of each job of the scheduler's that we know to have worked on it."""
    places = list(places)
    began = {r["job_id"]: place for place in places for r in read_attempts(results / place)}
    # Of attempts without a scheduler the id is no number.
    return {i: place for i, place in (began | by_id(results, places)).items() if i.isdigit()}


def fresh_records(results: Path, ids: Mapping[str, str] | None = None) -> Records:
    """Kept records of our jobs and what the scheduler knows beyond them, by `Attempt.key`.

    Args:
        ids: of jobs that we know of otherwise, with their places.

    Raises:
        ClusterError: the accounting does not answer.
    """
    known, ours = kept_records(results), Known(results, ids)
    since = changed_since(known.values())
    return known | {a.key: a for a in history(since=since) if a in ours}


def kept_records(results: Path) -> Records:
    """Records of our jobs that were seen before, by `Attempt.key`."""
    path = results / RECORDS
    if not path.exists():
        return {}
    found: Records = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            attempt = Attempt(**json.loads(line))
        except (ValueError, TypeError) as error:
            raise ArtifactError(
                f"{path}:{number} is no record of a job ({error}): delete the line; what the "
                "scheduler still knows is asked again"
            ) from None
        found[attempt.key] = attempt
    return found


def store_records(results: Path, records: Records) -> None:
    """Write what is kept of the scheduler's records."""
    with (
        atomic_path(results / RECORDS) as temporary,
        open(temporary, "w", encoding="utf-8") as handle,
    ):
        handle.writelines(json.dumps(vars(attempt)) + "\n" for attempt in records.values())


def merge_records(one: Records, other: Records) -> Records:
    """All records of both; of two of one attempt the one that knows its end."""
    return {**one, **{key: a for key, a in other.items() if a.end is not None or key not in one}}


def changed_since(known: Collection[Attempt]) -> int:
    """Time (Unix seconds) from which the scheduler may know more than these; 0: from the start."""
    if not known:
        return 0
    newest = max(attempt.submit for attempt in known)
    unfinished = [attempt.submit for attempt in known if attempt.end is None]
    return max(0, min([newest, *unfinished]) - OVERLAP_S)


def slurm_rows(
    attempts: Iterable[Attempt], places: Iterable[str], results: Path, *, full_billing: float
) -> list[dict[str, Any]]:
    """Ledger rows of the attempts that worked on these places.

    Args:
        attempts: records of any jobs.
        places: `{stage}/{key}` of the study's directories.
        full_billing: what an hour of a full node is billed.
    """
    places = list(places)
    place_of, place_of_id = by_comment(places), _place_of_id(results, places)
    numbers: dict[str, int] = {}
    measured: dict[str, dict[str, list[dict[str, Any]]]] = {}
    rows = []
    for attempt in sorted(attempts, key=lambda a: (a.submit, a.job_id)):
        place = place_of.get(attempt.comment)
        if place is None and not attempt.comment:
            place = place_of_id.get(attempt.job_id)
        if place is None:
            continue
        numbers[attempt.job_id] = numbers.get(attempt.job_id, 0) + 1
        if place not in measured:
            measured[place] = _measured(results / place)
        told = measured[place].get(attempt.job_id, [])
        joules, source = _energy(attempt, told)
        stage, _, key = place.partition("/")
        hours = attempt.elapsed_s / 3600
        rows.append(
            {
                "cluster": attempt.cluster,
                "job_id": attempt.job_id,
                "submit_time": _iso(attempt.submit),
                "attempt": numbers[attempt.job_id],
                "rule": stage,
                "run": key,
                "state": attempt.state,
                "reason": attempt.reason or _own_reason(results / place, attempt, told),
                "nodes": attempt.nodes,
                "gpus": attempt.gpus,
                "elapsed_s": float(attempt.elapsed_s),
                "node_hours": hours * attempt.billing / full_billing,
                "gpu_hours": hours * attempt.gpus,
                "core_hours": None,
                "energy_j": joules,
                "energy_source": source,
            }
        )
    return rows


def _measured(directory: Path) -> dict[str, list[dict[str, Any]]]:
    """Closing records of the job's own side, by job id, oldest first."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in read_attempts(directory):
        if record["state"] != "RUNNING":
            found.setdefault(record["job_id"], []).append(record)
    return found


def _own_reason(directory: Path, attempt: Attempt, records: Sequence[Mapping[str, Any]]) -> str:
    """Why an attempt ended badly, where the scheduler gives no reason: as our side knows it."""
    if attempt.end is None or attempt.state == "COMPLETED":
        return ""
    job = job_record(directory)
    if job.get("job_id") == attempt.job_id and job.get("why"):
        return job["why"]
    return next((r["reason"] for r in reversed(records) if r["reason"]), "")


def _energy(attempt: Attempt, records: Sequence[Mapping[str, Any]]) -> tuple[float | None, str]:
    if attempt.energy_j is not None:
        return attempt.energy_j, "Slurm ConsumedEnergyRaw"
    if attempt.start is None:
        return None, "not measured"
    end = float("inf") if attempt.end is None else attempt.end + 1
    for record in records:
        ours = attempt.start - 1 <= record["start"] <= end
        if ours and record.get("energy_j") is not None:
            return record["energy_j"], record.get("energy_source", "")
    return None, "not measured"


def _iso(seconds: int) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
