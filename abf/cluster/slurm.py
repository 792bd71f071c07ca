"""Slurm's commands as typed calls: the queue, the records, and requeueing.

Fields are separated by the ASCII unit separator, which no name contains. Times are Unix seconds,
memory MB. Every call is bounded; what Slurm says when it refuses is in the error.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from abf.errors import ClusterError

SEPARATOR = "\x1f"
TIMEOUT_S = 120
"""A controller that is being restarted answers within a minute; a hung one must not hang us."""

WAITING = frozenset({"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "RESV_DEL_HOLD"})
ACTIVE = frozenset(
    {"RUNNING", "COMPLETING", "CONFIGURING", "RESIZING", "SIGNALING", "STAGE_OUT", "STOPPED"}
) | {"SUSPENDED"}
ENDED = frozenset(
    {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL"}
) | {"DEADLINE", "PREEMPTED", "REVOKED"}


@dataclass(frozen=True)
class QueuedJob:
    """A job in the queue: waiting, running, or ended so recently that the controller knows it."""

    job_id: str
    state: str
    reason: str
    name: str
    comment: str
    partition: str
    time_left: str

    @property
    def live(self) -> bool:
        """Waiting or running."""
        return self.state not in ENDED


@dataclass(frozen=True)
class JobRecord:
    """One attempt in the accounting records."""

    job_id: str
    state: str
    """Without the "by UID" of a cancelled job."""
    exit_code: str
    reason: str
    node_list: str


_QUEUE = {
    "job_id": "%i",
    "state": "%T",
    "reason": "%r",
    "name": "%j",
    "comment": "%k",
    "partition": "%P",
    "time_left": "%L",
}
_RECORD = {
    "job_id": "JobIDRaw",
    "state": "State",
    "exit_code": "ExitCode",
    "reason": "Reason",
    "node_list": "NodeList",
}


def available() -> bool:
    """Whether this machine has Slurm's client commands."""
    return shutil.which("squeue") is not None


def call(*argv: str, timeout: float = TIMEOUT_S, extra: Mapping[str, str] | None = None) -> str:
    """Run a client command, with `extra` in its environment, and return what it prints.

    Raises:
        ClusterError: it is not installed, failed, or took longer than `timeout` seconds; says what
            Slurm said.
    """
    try:
        environment = clean_environment() | dict(extra or {})
        done = subprocess.run(
            argv, capture_output=True, text=True, timeout=timeout, env=environment
        )
    except FileNotFoundError:
        raise ClusterError(
            f"{argv[0]} is not installed here: run this where Slurm's commands are (a login node)"
        ) from None
    except subprocess.TimeoutExpired:
        raise ClusterError(f"{argv[0]} did not answer within {timeout:.0f} s") from None
    if done.returncode:
        said = (done.stderr or done.stdout).strip() or f"exit code {done.returncode}"
        raise ClusterError(f"{' '.join(argv[:2])}: {said}")
    return done.stdout


def clean_environment(environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """The environment without what a surrounding job left in it.

    A driver that is itself a job would hand its own geometry (SLURM_MEM_PER_NODE, SLURM_NTASKS ...)
    to what it submits, and Slurm would mix the two. Where to find the cluster stays.
    """
    current = os.environ if environment is None else environment
    inherited = ("SLURM_", "SLURMD_", "SBATCH_", "SRUN_", "SUBMITIT_")
    return {k: v for k, v in current.items() if k == "SLURM_CONF" or not k.startswith(inherited)}


def queue(*, name: str | None = None) -> list[QueuedJob]:
    """This user's jobs in the queue; with `name`, only those of that name."""
    pattern = SEPARATOR.join(_QUEUE.values())
    only = [] if name is None else [f"--name={name}"]
    text = call("squeue", "--me", "--noheader", "--states=all", f"--format={pattern}", *only)
    rows = [_row(_QUEUE, line) for line in text.splitlines()]
    return [QueuedJob(**row) for row in rows]


def records(job_ids: Sequence[str]) -> dict[str, JobRecord]:
    """What the accounting database says of these jobs' latest attempts; unknown ids are absent."""
    if not job_ids:
        return {}
    text = call(
        "sacct", "--allocations", "--noheader", "--parsable2", f"--delimiter={SEPARATOR}",
        f"--jobs={','.join(job_ids)}", f"--format={','.join(_RECORD.values())}",
    )  # fmt: skip
    found = {}
    for line in text.splitlines():
        fields = _row(_RECORD, line)
        fields["state"] = plain_state(fields["state"])
        found[fields["job_id"]] = JobRecord(**fields)
    return found


def requeue(job_id: str) -> None:
    """Put a running job back into the queue under its id."""
    call("scontrol", "requeue", job_id)


def cancel(job_ids: Sequence[str]) -> None:
    """Cancel jobs; those that have ended already are no error."""
    if job_ids:
        call("scancel", *job_ids)


def plain_state(state: str) -> str:
    """`CANCELLED by 1001` -> `CANCELLED`; `RUNNING+` -> `RUNNING`."""
    return state.split(" ")[0].rstrip("+")


def _row(names: Iterable[str], line: str) -> dict[str, str]:
    """Fields of a line by name; "None" is Slurm's word for no reason."""
    row = dict(zip(names, line.split(SEPARATOR), strict=True))
    return row | {"reason": "" if row["reason"] == "None" else row["reason"]}
