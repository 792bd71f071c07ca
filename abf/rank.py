"""The job's side of a training: one rank, which saves and queues the job again near its time limit.

`abf.launch` submits it; submitit runs it once per task under srun.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import submitit

from abf.cluster import slurm
from abf.commands import follow_stage, run_stage
from abf.errors import AbfError, Interrupted
from abf.track.endings import JOB
from abf.track.pace import checkpointed_step

FIRST_RANK_S = 10
"""How long the other ranks leave it to the first one to queue the job again, or to say why not."""


@dataclass
class TrainJob(submitit.helpers.Checkpointable):
    """One rank of a training; submitit runs it once per task under srun."""

    stage: str
    directory: str
    accept: tuple[str, ...] = ()
    """See `abf.commands.Job.accept`."""

    def __call__(self) -> None:
        """Run the stage; near the time limit, queue again and wait to be ended."""
        rank = int(os.environ["SLURM_PROCID"])
        job, restart = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
        os.environ["RANK"] = str(rank)
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        nodes = int(os.environ["SLURM_JOB_NUM_NODES"])
        os.environ["LOCAL_WORLD_SIZE"] = str(int(os.environ["SLURM_NTASKS"]) // nodes)
        # Named after this start of the job: an earlier one's meeting place is no longer served.
        place = Path(self.directory) / JOB / f"ranks-{job}-{restart}.json"
        os.environ["ABF_RENDEZVOUS"] = str(place)
        begun_at = checkpointed_step(Path(self.directory))
        # In place of submitit's: outside the loop, too, the signal means "save and queue again".
        signal.signal(signal.SIGUSR2, _time_is_up)
        signal.signal(signal.SIGTERM, _stop)
        try:
            if rank == 0:
                run_stage(self.stage, Path(self.directory), declared=False, accept=self.accept)
            else:
                follow_stage(self.stage, Path(self.directory), accept=self.accept)
        except Interrupted as error:
            print(error, file=sys.stderr, flush=True)
            if not error.requeue:
                raise
            if rank:
                # The first rank does it, unless it is in a call that no signal ends.
                time.sleep(FIRST_RANK_S)
            if checkpointed_step(Path(self.directory)) == begun_at:
                # The next time limit would go by like this one.
                stuck_mark(Path(self.directory), job).touch()
                raise
            slurm.requeue(job)
            # An exit now would be the job's end; the requeue ends every rank.
            time.sleep(slurm.TIMEOUT_S)
            raise
        except AbfError:
            if rank:
                # All fail alike, and the first to exit ends all: be it the one who keeps a record.
                time.sleep(FIRST_RANK_S)
            raise

    def checkpoint(self, *args: Any, **kwargs: Any) -> submitit.helpers.DelayedSubmission:
        """What a requeued job runs: the same, since all state is in files."""
        return submitit.helpers.DelayedSubmission(self)


def stuck_mark(directory: Path, job_id: str) -> Path:
    """File by which a job says that its time limit went by for nothing."""
    return directory / JOB / f"{job_id}.stuck"


def _time_is_up(number: int, _frame: Any) -> NoReturn:
    raise Interrupted(f"{signal.Signals(number).name} outside of training", requeue=True)


def _stop(number: int, _frame: Any) -> NoReturn:
    raise Interrupted(f"stopped by {signal.Signals(number).name}; nothing half-written was kept")
