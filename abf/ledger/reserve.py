"""Leave to submit one more job: many waiting rules, one remainder.

Between its submission and its first record a job is reserved for, in node-hours and by stage
directory, in `{results}/.driver/budget/reserved.json`; one lock there orders those who ask. The
sums they are held against are at most a poll old, so a burst of rules asks the scheduler once.
"""

from __future__ import annotations

import contextlib
import fcntl
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from abf.artifacts import read_plans
from abf.cluster import slurm
from abf.cluster.config import SiteConfig
from abf.cluster.history import Attempt
from abf.errors import ClusterError
from abf.files import read_own, write_json
from abf.ledger.budget import Used, check_dates, limits, measure, whose

FOLDER = Path(".driver", "budget")
USED, RESERVED = "used.json", "reserved.json"
CLOCK_SLACK_S = 60
"""By how much the clocks of scheduler and driver may differ."""


@contextlib.contextmanager
def allow(
    job_node_hours: float, *, place: str, job_name: str, results: Path, site: SiteConfig
) -> Iterator[Callable[[str], None]]:
    """Reserve for one job, for as long as its submission takes and until it is on record.

    The body submits and calls what it is given with the job's id; when the body fails, nothing
    stays reserved. Every study that plans the place counts it. Where the site has no allocation and
    no study a cap, nothing is asked of the scheduler.

    Args:
        job_node_hours: what the job may spend before its time limit (`job_node_hours`).
        place: `{stage}/{key}`.
        job_name: by which the job is known should its id never be written down.

    Raises:
        BudgetError: it does not fit; says by how much, and what to change.
        ClusterError: the accounting did not answer for `site.unknown_seconds`.
    """
    plans = [plan for plan in read_plans(results) if place in plan["stages"]]
    if site.allocation is None and all(plan.get("cap_node_hours") is None for plan in plans):
        yield lambda job_id: None
        return
    check_dates(site)
    folder = results / FOLDER
    with _answered_turn(folder, results, site) as used:
        reserved = _read(folder / RESERVED, {})
        others = {other: entry for other, entry in reserved.items() if other != place}
        for limit in limits(plans, used, site, reserved=others):
            limit.check(f"job {job_name}", job_node_hours, as_name="of this job")
        entry = {"node_hours": job_node_hours, "name": job_name, "job_id": None, "at": time.time()}
        write_json(folder / RESERVED, others | {place: entry})

    def change(**changes: Any) -> None:
        with _turn(folder):
            now = _read(folder / RESERVED, {})
            # Another look may have found the job on record already.
            if place in now and changes:
                write_json(folder / RESERVED, now | {place: now[place] | changes})
            elif place in now:
                write_json(folder / RESERVED, {k: v for k, v in now.items() if k != place})

    try:
        yield lambda job_id: change(job_id=job_id)
    except BaseException:
        change()
        raise


def open_reservations(
    results: Path, attempts: Sequence[Attempt], site: SiteConfig
) -> dict[str, dict[str, Any]]:
    """What is reserved for jobs that are not among these attempts, by place."""
    reserved = _read(results / FOLDER / RESERVED, {})
    return unrecorded(reserved, attempts, time.time() - site.unknown_seconds)


def unrecorded(
    reserved: Mapping[str, dict[str, Any]], attempts: Sequence[Attempt], oldest: float
) -> dict[str, dict[str, Any]]:
    """Reservations whose job is not on record; those from before `oldest` never became a job,
    unless the queue has it: a database that lags must not let another one through."""
    ids = {attempt.job_id for attempt in attempts}
    names: dict[str, int] = {}
    for attempt in attempts:
        names[attempt.name] = max(attempt.submit, names.get(attempt.name, 0))

    def on_record(entry: Mapping[str, Any]) -> bool:
        if entry["job_id"] is not None:
            return entry["job_id"] in ids
        return names.get(entry["name"], 0) >= entry["at"] - CLOCK_SLACK_S

    missing = {place: entry for place, entry in reserved.items() if not on_record(entry)}
    old = {entry["job_id"] for entry in missing.values() if entry["at"] < oldest} - {None}
    alive = old & {job.job_id for job in slurm.queue() if job.live} if old else old
    return {
        place: entry
        for place, entry in missing.items()
        if entry["at"] >= oldest or entry["job_id"] in alive
    }


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait for the lock on the reservations; the kernel takes it back when its holder dies."""
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / ".lock", "a", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


@contextlib.contextmanager
def _answered_turn(folder: Path, results: Path, site: SiteConfig) -> Iterator[Used]:
    """One's turn, with sums no older than a poll; an accounting that is away is waited for."""
    until = time.time() + site.unknown_seconds
    while True:
        with _turn(folder):
            try:
                used = _current(folder, results, site)
            except ClusterError as error:
                if time.time() > until:
                    raise
                print(f"budget: {error}; asking again", file=sys.stderr, flush=True)
            else:
                yield used
                return
        time.sleep(site.poll_seconds)


def _current(folder: Path, results: Path, site: SiteConfig) -> Used:
    """Sums of the last look, renewed when older than a poll; the caller has the turn."""
    found = _read(folder / USED, None)
    now = time.time()
    if found and found["who"] == whose(site) and 0 <= now - found["at"] < site.poll_seconds:
        return Used(**found)
    used, attempts = measure(results, site)
    reserved = _read(folder / RESERVED, {})
    open_ = unrecorded(reserved, attempts, used.at - site.unknown_seconds)
    if open_ != reserved:
        write_json(folder / RESERVED, open_)
    write_json(folder / USED, asdict(used))
    return used


def _read(path: Path, default: Any) -> Any:
    return read_own(path) if path.exists() else default
