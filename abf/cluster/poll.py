"""One look at the queue for all who wait: whoever finds the snapshot stale renews it for the rest.

`{folder}/jobs.json` holds the states of the jobs somebody watches; `{folder}/watched/{job_id}` says
that somebody does. The lock that is held while looking dies with its holder, so a killed waiter
stops nobody. In steady state this is one `squeue` an interval, for any number of jobs; `sacct` is
asked only for a watched job that the queue no longer lists.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from abf.cluster import slurm
from abf.errors import ClusterError, LockError
from abf.files import lock, read_if_json, write_json

UNKNOWN = "UNKNOWN"
"""Neither the queue nor the records know the id."""


@dataclass(frozen=True)
class JobState:
    """What the scheduler says of a job."""

    state: str
    reason: str = ""
    time_left: str = ""
    unknown_since: float | None = None
    """Unix seconds of the first look that found it nowhere."""

    @property
    def ended(self) -> bool:
        """It will not run again by itself."""
        return self.state in slurm.ENDED

    @property
    def live(self) -> bool:
        """In the queue, waiting or running."""
        return self.state in slurm.WAITING or self.state in slurm.ACTIVE


LOOKS = 3
"""Looks of a waiter at the shared view in an interval."""


class Watch:
    """A waiter's view of the scheduler, shared with all waiters on the same folder."""

    def __init__(self, folder: Path, *, interval: float) -> None:
        self.folder, self.interval = folder, interval
        self._file = folder / "jobs.json"

    def add(self, job_id: str) -> None:
        """Ask for the state of this job from the next look on."""
        mark = self.folder / "watched" / job_id
        mark.parent.mkdir(parents=True, exist_ok=True)
        mark.touch()

    def drop(self, job_id: str) -> None:
        """Nobody waits for this job any more."""
        (self.folder / "watched" / job_id).unlink(missing_ok=True)

    def state(self, job_id: str) -> JobState | None:
        """Newest known state, renewed when older than the interval; None before any look at it.

        A scheduler that does not answer keeps the old states: `trouble` says so.
        """
        if self._age() >= self.interval:
            try:
                with lock(self.folder / "poll", "look at the queue"):
                    if self._age() >= self.interval:  # nobody was faster
                        self._look()
            except LockError:
                pass  # somebody is looking right now
        found = self._read()["jobs"].get(job_id)
        return None if found is None else JobState(**found)

    def trouble(self) -> str:
        """Why the last look failed; empty if it did not."""
        return self._read()["trouble"]

    def wait(
        self,
        job_id: str,
        *,
        until: Callable[[JobState], bool],
        each: Callable[[JobState], None] = lambda state: None,
    ) -> JobState:
        """Sleep until `until` holds of the job's state, or it ended; `each` sees every state."""
        self.add(job_id)
        while True:
            state = self.state(job_id)
            if state is not None:
                each(state)
                if state.ended or until(state):
                    return state
            time.sleep(self.interval / LOOKS)

    def _age(self) -> float:
        try:
            return time.time() - self._file.stat().st_mtime
        except FileNotFoundError:
            return float("inf")

    def _read(self) -> dict:
        # Damaged is as good as missing: the next look writes it anew.
        return read_if_json(self._file) or {"jobs": {}, "trouble": ""}

    def _look(self) -> None:
        before = self._read()["jobs"]
        watched = sorted(p.name for p in (self.folder / "watched").glob("*"))
        try:
            found = look(watched, {k: JobState(**v) for k, v in before.items()})
            trouble = ""
        except ClusterError as error:
            found = {k: JobState(**before[k]) for k in watched if k in before}
            trouble = str(error)
        jobs = {job_id: asdict(state) for job_id, state in found.items()}
        write_json(self._file, {"jobs": jobs, "trouble": trouble})


def look(watched: list[str], before: dict[str, JobState]) -> dict[str, JobState]:
    """States of the watched jobs: the queue first, the records for those it does not list.

    Raises:
        ClusterError: the scheduler does not answer.
    """
    queued = {job.job_id: job for job in slurm.queue()} if watched else {}
    found: dict[str, JobState] = {}
    missing = []
    for job_id in watched:
        known = before.get(job_id)
        if job_id in queued:
            job = queued[job_id]
            found[job_id] = JobState(job.state, job.reason, job.time_left)
        elif known is not None and known.ended:
            found[job_id] = known
        else:
            missing.append(job_id)
    if missing:
        recorded = slurm.records(missing)
        for job_id in missing:
            if job_id in recorded:
                found[job_id] = JobState(recorded[job_id].state, recorded[job_id].reason)
            else:
                known = before.get(job_id)
                since = known.unknown_since if known and known.unknown_since else time.time()
                found[job_id] = JobState(UNKNOWN, unknown_since=since)
    return found
