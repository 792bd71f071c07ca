"""Who is at work on a results folder: jobs in the queue, the driver, holders of locks."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abf.cluster import slurm
from abf.cluster.jobs import OVER_BUDGET, RECORD, by_comment, by_id, tag
from abf.errors import ClusterError
from abf.files import lock_holder, read_if_json
from abf.seeing.planned import Planned

FRESH_SECONDS = 600
"""Age up to which the waiting rules' view of the queue stands in for one of our own."""


@dataclass(frozen=True)
class QueueEntry:
    """A live job."""

    job_id: str
    state: str
    reason: str
    time_left: str


def live_jobs(results: Path, trouble: list[str]) -> list[slurm.QueuedJob]:
    """Live jobs of this user's, or what the waiting rules last knew of theirs."""
    if slurm.available():
        try:
            return [job for job in slurm.queue() if job.live]
        except ClusterError as error:
            trouble.append(str(error).splitlines()[0])
    path = results / ".driver" / "jobs.json"
    age = time.time() - path.stat().st_mtime if path.exists() else FRESH_SECONDS
    if age >= FRESH_SECONDS:
        return []
    trouble.append(f"job states are {age:.0f} s old, from {path}")
    known = (read_if_json(path) or {"jobs": {}})["jobs"].items()
    states = [(job_id, s) for job_id, s in known if s["state"] in slurm.WAITING | slurm.ACTIVE]
    return [
        slurm.QueuedJob(job_id, s["state"], s["reason"], "", "", "", s["time_left"])
        for job_id, s in states
    ]


def jobs_by_place(planned: Planned, queue: Sequence[slurm.QueuedJob]) -> dict[str, QueueEntry]:
    """Live jobs by place: by the id in `job.json`, or by what the scheduler was told of them."""
    if not queue:
        return {}
    submitted, said = by_id(planned.results, planned.places), by_comment(planned.places)
    name = tag(planned.results)
    found = {}
    for job in queue:
        place = submitted.get(job.job_id)
        if place is None and job.name.startswith(name):
            place = said.get(job.comment)
        if place is not None:
            found[place] = QueueEntry(job.job_id, job.state, job.reason, job.time_left)
    return found


def driver_line(results: Path, queue: Sequence[slurm.QueuedJob]) -> str:
    """Who drives these results."""
    path = results / ".driver" / "drive.json"
    record = read_if_json(path) or {}
    job = next((job for job in queue if job.job_id == record.get("job_id")), None)
    holder = lock_holder(results / ".driver" / ".lock")
    if job is not None:
        now = " ".join(f"{job.state} {job.reason if job.state in slurm.WAITING else ''}".split())
        return f"job {job.job_id} on {record['study']}: {now}, {job.time_left} left"
    if holder is not None and holder.alive is not False:
        return holder.text + (
            "" if holder.alive else " (whether it lives cannot be seen from here)"
        )
    if record:
        return f"none at work; job {record['job_id']} on {record['study']}: {record['state']}"
    return "none at work" if holder is None else f"none at work; the last was {holder.text}"


def job_said(directory: Path, record: Mapping[str, Any], last: Mapping[str, Any] | None) -> str:
    """What became of a directory's last submitted job; empty where its attempts say it better.

    Args:
        record: of that job, as `job_record` reads it.
        last: outcome of the newest attempt.
    """
    if not record or (last is not None and last["end"] > (directory / RECORD).stat().st_mtime):
        return ""
    job_id = record.get("job_id")
    if over := record.get(OVER_BUDGET):
        return f"refused: {over}"
    if refused := record.get("refused"):
        return f"the scheduler refused the job: {refused}"
    if job_id is None:
        return "whoever asked the scheduler for a job died before it answered"
    if ended := record.get("ended"):
        why = record.get("why") or (last["reason"] if last is not None else "")
        return f"job {job_id} ended as {ended}" + (f": {why}" if why else "")
    return f"submitted as job {job_id}, which has not begun"
