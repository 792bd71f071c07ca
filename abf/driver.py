"""The driver, Snakemake's process: one at a time on a results folder, and what a dead one left.

On a cluster a killed driver's jobs run on. They are recognised by their name and the rule and key
in their comment, and waited for before anything is submitted; what they finish is then only
declared (`abf.stage.is_finished`), so no job's work is done twice.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

from abf.cluster import slurm
from abf.cluster.jobs import rule_comment, tag
from abf.cluster.slurm import QueuedJob
from abf.files import lock

NOTICE_SECONDS = 60
"""Longest pause between two looks of the Slurm executor at its jobs; its own limit of 180 s would
notice a cancelled job only after three minutes."""

_held = contextlib.ExitStack()
_claimed: set[Path] = set()


def claim(results: Path, study: str) -> None:
    """Hold the results folder until this process ends, however it ends.

    Snakemake's own lock outlives a killed driver and does not say whose it is; the profiles switch
    it off in favour of this one.

    Raises:
        LockError: another driver holds it; names it.
    """
    folder = results / ".driver"
    if folder not in _claimed:  # once is enough
        _held.enter_context(lock(folder, f"snakemake on {study}"))
        _claimed.add(folder)
        atexit.register(_held.close)  # takes our name off the lock


def settle(results: Path, places: Collection[str], *, interval: float) -> None:
    """Wait until no job of an earlier driver is at work on these stage directories.

    Args:
        places: `{stage}/{key}` of every planned directory.
        interval: seconds between two looks at the queue.

    Raises:
        ClusterError: the scheduler does not answer.
    """
    told: set[str] = set()
    while live := orphans(results, places):
        for job in live:
            if job.job_id not in told:
                told.add(job.job_id)
                print(
                    f"job {job.job_id} ({job.comment}, {job.state}) is an earlier driver's: "
                    f"waiting for it, or cancel it with `scancel {job.job_id}`",
                    file=sys.stderr,
                    flush=True,
                )
        time.sleep(interval)


def orphans(results: Path, places: Collection[str]) -> list[QueuedJob]:
    """Live jobs of Snakemake's that work on these stage directories of a results folder."""
    comments, name = {rule_comment(place) for place in places}, tag(results)
    return [
        job
        for job in slurm.queue()
        if job.live and job.name.startswith(name) and job.comment in comments
    ]


def adapt_executor(results: Path) -> None:
    """Let Snakemake's Slurm executor name its jobs after the results folder and log there; cap its
    pause between two looks at `NOTICE_SECONDS`."""
    from snakemake_executor_plugin_slurm import Executor

    begin = Executor.__post_init__

    @functools.wraps(begin)
    def named(self: Executor, *args: Any, **kwargs: Any) -> None:
        # Its settings exist only now, after the Snakefile was read.
        settings = self.workflow.executor_settings  # type: ignore[attr-defined]
        settings.jobname_prefix = tag(results)
        settings.logdir = results.resolve() / "logs" / "slurm"
        begin(self, *args, **kwargs)

    Executor.__post_init__ = named

    name = "_next_seconds"

    def read(self: Executor) -> float:
        return min(getattr(self, name, NOTICE_SECONDS), NOTICE_SECONDS)

    def write(self: Executor, seconds: float) -> None:
        setattr(self, name, seconds)

    # The executor sets this attribute anew after every look; a property hears of it.
    Executor.next_seconds_between_status_checks = property(read, write)  # type: ignore[assignment]
