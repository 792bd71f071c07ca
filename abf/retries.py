"""Which failed jobs Snakemake tries again: those that a node or a limit ended, no others.

`restart-times` knows no difference. But what failed by itself has a closing record that says so
(`abf.track.attempts`), and would fail again in the same way, on paid nodes. What was ended from
outside has none (killed, power lost) or was told to stop (time limit, preemption).
"""

from __future__ import annotations

import time
from pathlib import Path

from abf.errors import ArtifactError
from abf.stages import stage_dir
from abf.track.attempts import read_attempts


def retry_only_what_was_ended() -> None:
    """Let Snakemake's scheduler give up on jobs that failed by themselves from now on."""
    from snakemake.jobs import Job

    began = time.time()

    def restart_times(self: Job) -> int | None:
        manifest = self.output.get("manifest")  # `all` has none, and nothing to fail
        refused = manifest is not None and failed_by_itself(stage_dir(manifest), since=began)
        return 0 if refused else self.rule.restart_times

    Job.restart_times = property(restart_times)  # type: ignore[assignment]


def failed_by_itself(directory: Path, *, since: float) -> bool:
    """Whether the newest attempt at a stage directory ended with an error of its own.

    Args:
        since: Unix seconds; an older attempt says nothing of a job that never began.
    """
    try:
        attempts = read_attempts(directory)
    except ArtifactError:  # damaged: every attempt is refused for that
        return True
    return bool(attempts) and attempts[-1]["state"] == "FAILED" and attempts[-1]["start"] >= since
