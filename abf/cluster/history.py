"""Every attempt of every job, from the scheduler's records (`sacct --duplicates`).

Times are Unix seconds, durations seconds, energy joules. A requeued job has one record per attempt
under one id; without `--duplicates` all but the last would be missing from the books.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from abf.cluster.slurm import SEPARATOR, call, plain_state

_FIELDS = {
    "cluster": "Cluster",
    "job_id": "JobIDRaw",
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
    "workdir": "WorkDir",
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
    workdir: str


def history(
    *, since: int, account: str | None = None, everybody: bool = False
) -> Iterator[Attempt]:
    """Attempts that were in the system since a time, oldest first for each job.

    Args:
        since: Unix seconds.
        account: only this account's.
        everybody: all users' (where the site shows them), not only ours.

    Raises:
        ClusterError: the accounting does not answer.
    """
    argv = [
        *("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2"),
        *(
            f"--delimiter={SEPARATOR}",
            f"--starttime=@{since}" if since else "--starttime=1970-01-02",
        ),
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
            workdir=row["workdir"],
        )


def _tres(text: str) -> Mapping[str, str]:
    """`billing=64,cpu=64,mem=964G,node=2` by name."""
    return dict(part.split("=", 1) for part in text.split(",") if "=" in part)


def _time(text: str) -> int | None:
    return int(text) if text.isdigit() else None


def _energy(text: str) -> float | None:
    """Joules; a scheduler without a meter says nothing or 0."""
    return float(text) if text.isdigit() and int(text) > 0 else None
