"""Why a job of the scheduler's failed: what its ranks, srun and the scheduler left on record.

Rank 0 closes the attempt's record with its own error, unless it was killed; srun tells in the job's
log which rank ended first; the scheduler knows the exit code.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from abf.track.attempts import read_attempts

JOB = ".job"
"""Folder in a stage directory for a job's script and logs, and for the ranks' meeting."""
START = "=== start"
"""Begins the line that a job's script writes into the log at each of its starts."""
_TASK = re.compile(r"srun: error: (\S+): tasks? (\d+)[\d,-]*: (.+)")
_PLAIN = "Exited with exit code"


def why_failed(directory: Path, job_id: str, exit_code: Callable[[], str]) -> str:
    """Why a job that worked on a stage directory failed, in one line.

    Args:
        exit_code: asks the scheduler for `CODE:SIGNAL`; only when nobody else says anything.
    """
    closed = [
        record
        for record in read_attempts(directory)
        if record["job_id"] == job_id and record["state"] != "RUNNING"
    ]
    own = closed[-1]["reason"] if closed else ""
    first = _first_to_end(directory / JOB / f"{job_id}_0_log.err")
    if first is not None:
        host, rank, how = first
        if not own or not how.startswith(_PLAIN):
            return f"rank {rank} on {host}: {how}" + (f"; then rank 0: {own}" if own else "")
        if rank:  # ranks that fail alike end in any order
            return f"{own} (rank {rank} on {host} ended first: {how})"
    return own or f"no rank left a reason; the scheduler has exit code {exit_code()} (code:signal)"


def _first_to_end(log: Path) -> tuple[str, int, str] | None:
    """Host, rank and end of the rank that ended first in the job's last start, as srun says."""
    if not log.exists():
        return None
    text = log.read_text(encoding="utf-8", errors="replace").rpartition(START)[2]
    found = _TASK.search(text)
    return None if found is None else (found[1], int(found[2]), found[3].strip())
