"""One look at a results folder for `abf status`: counts, work, cost, failure.

States of a stage directory: done, outdated (made with another configuration or stage version),
running, waiting (in the queue), failed, to do. Hours are core-hours for work without a scheduler
and node-hours for the scheduler's; times are Unix seconds. Reads files and asks the scheduler once;
`abf.status` makes text of it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abf.cluster import slurm
from abf.cluster.jobs import RECORD, job_record
from abf.files import lock_holder, read_own, sha256
from abf.seeing.at_work import (
    QueueEntry,
    driver_line,
    job_said,
    jobs_by_place,
    live_jobs,
)
from abf.seeing.hours import Hours, hours_spent, hours_to_come
from abf.seeing.planned import Planned
from abf.stage import DONE
from abf.stages import CONFIG, MANIFEST, STAGES
from abf.track.outcomes import attempt_outcomes
from abf.track.pace import Pace, read_pace

STATES = ("done", "running", "waiting", "failed", "to do", "outdated")
TAIL_LINES = 8


@dataclass(frozen=True)
class Work:
    """A directory that is running or waiting."""

    place: str
    state: str
    since: float | None
    """When the process began; None while waiting."""
    job: QueueEntry | None
    process: str
    """Process and host of work without a scheduler."""
    pace: Pace | None
    """Of a training."""


@dataclass(frozen=True)
class Failure:
    """A directory whose last attempt failed."""

    place: str
    when: float
    reason: str
    log: Path | None
    lines: tuple[str, ...]
    """The log's end."""


@dataclass(frozen=True)
class Status:
    """One look at a results folder."""

    planned: Planned
    states: Mapping[str, str]
    """State of every planned place."""
    undeclared: int
    """Of those done: finished by a job whose rule was not there to declare it."""
    work: Sequence[Work]
    driver: str
    spent: Hours
    attempts: int
    to_come: Mapping[str, Hours]
    """Stage -> forecast of what is not done, from what is."""
    unmeasured: Sequence[str]
    """Stages of which something is to do that nothing finished is like."""
    failure: Failure | None
    trouble: Sequence[str]
    """What could not be asked."""

    def count(self, stage: str, state: str) -> int:
        """Directories of a stage in that state."""
        return sum(s == state for p, s in self.states.items() if p.partition("/")[0] == stage)


def look(planned: Planned) -> Status:
    """Read everything once.

    Raises:
        ArtifactError: an `attempts.jsonl` has a line that is no record; names it.
    """
    trouble: list[str] = []
    queue = live_jobs(planned.results, trouble)
    jobs = jobs_by_place(planned, queue)
    states, work, failures, undeclared = {}, [], [], 0
    for place in planned.places:
        directory = planned.results / place
        outcomes = attempt_outcomes(directory)
        state, reason = state_of(directory, place, outcomes, jobs.get(place))
        states[place] = state
        if state in ("running", "waiting"):
            work.append(_work(directory, place, state, outcomes, jobs.get(place)))
        elif state == "failed":
            when = outcomes[-1]["end"] if outcomes else (directory / RECORD).stat().st_mtime
            failures.append((when, place, reason))
        elif state == "done":
            undeclared += not (directory / MANIFEST).exists()
    spent, attempts = hours_spent(planned, trouble)
    to_come, unmeasured = hours_to_come(planned, states, spent)
    newest = max(failures, default=None)
    return Status(
        planned=planned,
        states=states,
        undeclared=undeclared,
        work=work,
        driver=driver_line(planned.results, queue),
        spent=sum(spent.values(), Hours()),
        attempts=attempts,
        to_come=to_come,
        unmeasured=unmeasured,
        failure=None if newest is None else _failure(planned.results, *newest),
        trouble=trouble,
    )


def state_of(
    directory: Path, place: str, outcomes: Sequence[Mapping[str, Any]], job: QueueEntry | None
) -> tuple[str, str]:
    """State of a directory, and why it failed."""
    last = outcomes[-1] if outcomes else None
    if job is not None:
        return ("running" if job.state in slurm.ACTIVE else "waiting"), ""
    if last is not None and last["state"] == "RUNNING":
        return "running", ""
    if (directory / MANIFEST).exists():
        return _done_or_outdated(directory, directory / MANIFEST, place), ""
    record = job_record(directory)
    said = job_said(directory, record, last)
    if said and "ended" in record:
        return "failed", said
    if last is not None and last["state"] in ("FAILED", "KILLED"):
        return "failed", last["reason"]
    if (directory / DONE / MANIFEST).exists():
        return _done_or_outdated(directory, directory / DONE / MANIFEST, place), ""
    if record and record.get("job_id") is None:
        if (holder := lock_holder(directory / ".job" / ".lock")) and holder.alive:
            return "waiting", ""
        return "failed", said
    return "to do", ""


def _done_or_outdated(directory: Path, path: Path, place: str) -> str:
    manifest = read_own(path)
    config = directory / CONFIG
    current = manifest["stage_version"] == STAGES[place.partition("/")[0]].version and (
        manifest["config"] is None or (config.exists() and manifest["config"] == sha256(config))
    )
    return "done" if current else "outdated"


def _work(
    directory: Path,
    place: str,
    state: str,
    outcomes: Sequence[Mapping[str, Any]],
    job: QueueEntry | None,
) -> Work:
    alive = outcomes[-1] if outcomes and outcomes[-1]["state"] == "RUNNING" else None
    return Work(
        place=place,
        state=state,
        since=alive["start"] if alive else None,
        job=job,
        process=f"process {alive['pid']} on {alive['host']}" if alive and job is None else "",
        pace=read_pace(directory / "journal.jsonl") if state == "running" else None,
    )


# --- the last failure --------------------------------------------------------------------------


def _failure(results: Path, when: float, place: str, reason: str) -> Failure:
    log = next(_logs(results, place), None)
    lines: list[str] = []
    if log is not None:
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = [line for line in text.splitlines() if line.strip()]
    return Failure(place, when, reason, log, tuple(lines[-TAIL_LINES:]))


def _logs(results: Path, place: str) -> Iterator[Path]:
    """Logs of a directory, the most telling first: the job's own, then the rule's."""
    own = (results / place / ".job").glob("*_0_log.err")
    filled = [path for path in own if path.stat().st_size]
    yield from sorted(filled, key=lambda path: path.stat().st_mtime, reverse=True)[:1]
    path = results / "logs" / f"{place}.log"
    if path.exists():
        yield path
