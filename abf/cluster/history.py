"""Every attempt of every job, from the scheduler's records (`sacct --duplicates`).

Times are Unix seconds, durations seconds, energy joules. A requeued job has one record per attempt
under one id; without `--duplicates` all but the last would be missing from the books.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from abf.cluster.slurm import SEPARATOR, call, plain_state

_FIELDS = {
    "cluster": "Cluster",
    "job_id": "JobIDRaw",
    "shown_id": "JobID",
    "user": "User",
    "name": "JobName",
    "comment": "Comment",
    "account": "Account",
    "submit": "Submit",
    "start": "Start",
    "end": "End",
    "elapsed": "ElapsedRaw",
    "limit": "TimelimitRaw",
    "state": "State",
    "reason": "Reason",
    "exit_code": "ExitCode",
    "tres": "AllocTRES",
    "requested": "ReqTRES",
    "energy": "ConsumedEnergyRaw",
}


@dataclass(frozen=True)
class Attempt:
    """One attempt at a job."""

    cluster: str
    job_id: str
    name: str
    comment: str
    account: str
    submit: int
    """When this attempt entered the queue; a requeue is a new entry."""
    start: int | None
    end: int | None
    elapsed_s: int
    limit_min: int | None
    state: str
    reason: str
    exit_code: str
    billing: float
    """What the scheduler bills an hour of it; 0 before it started."""
    nodes: int
    gpus: int
    requested_billing: float
    energy_j: float | None
    """As the scheduler measured it; None where it does not."""
    user: str = ""
    tasks: int = 1
    """More than one only for the waiting tasks of a job array, which share one record."""

    @property
    def key(self) -> tuple[str, str, int]:
        """Cluster, job id and submit time: no other attempt has them."""
        return self.cluster, self.job_id, self.submit


def history(
    *, since: int, account: str | None = None, everybody: bool = False
) -> Iterator[Attempt]:
    """Attempts that were in the system since a time, oldest first for each job.

    Args:
        since: Unix seconds; some that ended up to an hour earlier may come, too.
        account: only this account's.
        everybody: all users' (where the site shows them), not only ours.

    Raises:
        ClusterError: the accounting does not answer.
    """
    # Slurm reads local times only; an hour more, since one of them comes twice in autumn.
    first = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(max(since - 3600, 86_400)))
    argv = [
        *("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2"),
        *(f"--delimiter={SEPARATOR}", f"--starttime={first}"),
        f"--format={','.join(_FIELDS.values())}",
    ]
    if account:
        argv.append(f"--accounts={account}")
    if everybody:
        argv.append("--allusers")
    text = call(*argv, extra={"SLURM_TIME_FORMAT": "%s"})
    return parse(text)


def parse(text: str) -> Iterator[Attempt]:
    """Attempts in what sacct printed."""
    for line in text.splitlines():
        row = dict(zip(_FIELDS, line.split(SEPARATOR), strict=True))
        tres, requested = _tres(row["tres"]), _tres(row["requested"])
        yield Attempt(
            cluster=row["cluster"],
            job_id=row["job_id"],
            name=row["name"],
            comment=row["comment"],
            account=row["account"],
            submit=int(row["submit"]),
            start=_time(row["start"]),
            end=_time(row["end"]),
            elapsed_s=int(row["elapsed"] or 0),
            limit_min=int(row["limit"]) if row["limit"].isdigit() else None,
            state=plain_state(row["state"]),
            reason=row["reason"] if row["reason"] != "None" else "",
            exit_code=row["exit_code"],
            billing=float(tres.get("billing", 0)),
            nodes=int(tres.get("node", 0)),
            gpus=int(tres.get("gres/gpu", 0)),
            requested_billing=float(requested.get("billing", 0)),
            energy_j=_energy(row["energy"]),
            user=row["user"],
            tasks=_tasks(row["shown_id"]),
        )


def _tasks(shown_id: str) -> int:
    """Tasks that a record stands for: `7_[0-9:3,20%4]` are 5 (four at once at most), others 1."""
    _, bracket, listed = shown_id.partition("_[")
    if not bracket:
        return 1
    count = 0
    for part in listed.rstrip("]").partition("%")[0].split(","):
        span, _, step = part.partition(":")
        first, _, last = span.partition("-")
        if first.isdigit():  # a list too long to be shown ends in dots
            count += (int(last or first) - int(first)) // int(step or 1) + 1
    return max(count, 1)


@functools.lru_cache(maxsize=4096)  # a study's jobs ask for few different things
def _tres(text: str) -> Mapping[str, str]:
    """`billing=64,cpu=64,mem=964G,node=2` by name."""
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)


def _time(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _energy(text: str) -> float | None:
    """Joules; a scheduler without a meter says nothing or 0."""
    return float(text) if text.isdigit() and int(text) > 0 else None
