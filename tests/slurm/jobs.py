"""What tests ask of jobs in a box: submit, wait for a state, list attempts. Times in seconds."""

from __future__ import annotations

from pathlib import Path

from tests.slurm.box import Box
from tests.slurm.daemons import wait_for

FIELDS: tuple[str, ...] = (
    "JobID",
    "State",
    "Submit",
    "Start",
    "End",
    "ElapsedRaw",
    "ExitCode",
    "AllocTRES",
)


def submit(box: Box, command: str, *options: str, log: Path | None = None) -> str:
    """Job id of `command`, submitted to the GPU partition for at most five minutes."""
    output = ("--output", str(log or "/dev/null"))
    default = ("--partition", "boost_usr_prod", "--time", "5", *output)
    return box.run("sbatch", "--parsable", *default, *options, "--wrap", command).stdout.strip()


def show(box: Box, job: str) -> dict[str, str]:
    """What the controller knows of a job: JobState, Reason, NodeList, Restarts …"""
    text = box.run("scontrol", "--oneliner", "show", "job", job).stdout
    return dict(word.split("=", 1) for word in text.split() if "=" in word)


def wait_state(box: Box, job: str, *states: str, seconds: float = 60) -> dict[str, str]:
    """The job's record as soon as it is in one of these states."""
    last: dict[str, str] = {}

    def reached() -> bool:
        last.update(show(box, job))
        return last["JobState"] in states

    wait_for(f"job {job} {'/'.join(states)}", reached, seconds=seconds, every=0.2)
    return last


def attempts(box: Box, job: str) -> list[dict[str, str]]:
    """The accounting's rows of a job, one an attempt, oldest first."""
    show = ("sacct", "--allocations", "--duplicates", "--noheader", "--parsable2")
    text = box.run(*show, "--jobs", job, "--format", ",".join(FIELDS)).stdout
    rows = [dict(zip(FIELDS, line.split("|"), strict=True)) for line in text.splitlines()]
    return sorted(rows, key=lambda row: row["Submit"])


def jobs_of(box: Box, folder: Path) -> list[dict[str, str]]:
    """The accounting's rows of every attempt of every job submitted from a folder, oldest first."""
    names = (*FIELDS, "JobIDRaw", "Comment", "WorkDir")
    text = box.run(
        "sacct", "--allocations", "--duplicates", "--noheader", "--parsable2",
        "--starttime=1970-01-02", f"--format={','.join(names)}",
    ).stdout  # fmt: skip
    rows = [dict(zip(names, line.split("|"), strict=True)) for line in text.splitlines()]
    found = [row for row in rows if row["WorkDir"] == str(folder)]
    return sorted(found, key=lambda row: row["Submit"])


def wait_attempts(box: Box, job: str, *states: str, seconds: float = 30) -> list[dict[str, str]]:
    """The rows once their states are these; the controller sends them some seconds late.

    `CANCELLED by 0` counts as CANCELLED.
    """

    def written() -> bool:
        return [row["State"].split()[0] for row in attempts(box, job)] == list(states)

    wait_for(f"sacct rows {states} of job {job}", written, seconds=seconds, every=0.3)
    return attempts(box, job)
