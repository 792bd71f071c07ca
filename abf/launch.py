"""Training as a job of the scheduler's: submit or re-attach, wait cheaply, declare what finished.

The rule's process is light and may die at any time: the job goes on, its id is in
`{directory}/job.json` (`abf.cluster.jobs`), and the next process attaches to it instead of
submitting again. On the job's side every rank runs `TrainJob`; near the time limit all save, and
the first puts the job back into the queue under its own id, as often as it takes. The job leaves
its manifest undeclared (`.done/`); only the waiting rule gives it the name that Snakemake looks
for.
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
from submitit.core.utils import FailedJobError

from abf.cluster import slurm
from abf.cluster.config import LaunchConfig, SiteConfig
from abf.cluster.jobs import job_record, launch_comment, tag, write_job_record
from abf.cluster.poll import UNKNOWN, JobState, Watch
from abf.commands import Job, follow_stage, run_stage
from abf.errors import ClusterError, Interrupted
from abf.files import lock
from abf.instance import LAUNCH
from abf.ledger.budget import job_node_hours
from abf.ledger.reserve import allow
from abf.site import load_site
from abf.stage import declare
from abf.track.attempts import read_attempts
from abf.track.pace import checkpointed_step

FOLDER = ".job"
"""Folder in the stage directory for submitit's script and logs, and for the ranks' meeting."""
RESUBMIT = frozenset({"NODE_FAIL", "BOOT_FAIL", "TIMEOUT", "PREEMPTED", UNKNOWN})
"""Ends that are nobody's wish and no fault of the training: it goes on from its checkpoint."""
NO_PROGRESS = (
    "a whole time limit went by without one more checkpoint, so that another would, too: raise "
    "launch.minutes, or lower signal_seconds of the site file if the warning comes too early"
)
FIRST_RANK_S = 10
"""How long the other ranks leave it to the first one to queue the job again."""
SETTLE_LOOKS = 2
"""Looks at the queue before an end that Slurm may still turn into a requeue is believed."""


# --- the job's side ----------------------------------------------------------------------------


@dataclass
class TrainJob(submitit.helpers.Checkpointable):
    """One rank of a training; submitit runs it once per task under srun."""

    stage: str
    directory: str

    def __call__(self) -> None:
        """Run the stage; near the time limit, queue again and wait to be ended."""
        rank = int(os.environ["SLURM_PROCID"])
        job, restart = os.environ["SLURM_JOB_ID"], os.environ.get("SLURM_RESTART_COUNT", "0")
        os.environ["RANK"] = str(rank)
        os.environ["WORLD_SIZE"] = os.environ["SLURM_NTASKS"]
        os.environ["LOCAL_RANK"] = os.environ["SLURM_LOCALID"]
        # Named after this start of the job: an earlier one's meeting place is no longer served.
        place = Path(self.directory) / FOLDER / f"ranks-{job}-{restart}.json"
        os.environ["ABF_RENDEZVOUS"] = str(place)
        begun_at = checkpointed_step(Path(self.directory))
        # In place of submitit's: outside the loop, too, the signal means "save and queue again".
        signal.signal(signal.SIGUSR2, _time_is_up)
        signal.signal(signal.SIGTERM, _stop)
        try:
            if rank == 0:
                run_stage(self.stage, Path(self.directory), declared=False)
            else:
                follow_stage(self.stage, Path(self.directory))
        except Interrupted as error:
            print(error, file=sys.stderr, flush=True)
            if not error.requeue:
                raise
            if rank:
                # The first rank does it, unless it is in a call that no signal ends.
                time.sleep(FIRST_RANK_S)
            if checkpointed_step(Path(self.directory)) == begun_at:
                # The next time limit would go by like this one.
                _stuck(Path(self.directory), job).touch()
                raise
            slurm.requeue(job)
            # An exit now would be the job's end; the requeue ends every rank.
            time.sleep(slurm.TIMEOUT_S)
            raise

    def checkpoint(self, *args: Any, **kwargs: Any) -> submitit.helpers.DelayedSubmission:
        """What a requeued job runs: the same, since all state is in files."""
        return submitit.helpers.DelayedSubmission(self)


def _stuck(directory: Path, job_id: str) -> Path:
    """File by which a job says that its time limit went by for nothing."""
    return directory / FOLDER / f"{job_id}.stuck"


def _time_is_up(number: int, _frame: Any) -> NoReturn:
    raise Interrupted(f"{signal.Signals(number).name} outside of training", requeue=True)


def _stop(number: int, _frame: Any) -> NoReturn:
    raise Interrupted(f"stopped by {signal.Signals(number).name}; nothing half-written was kept")


# --- the rule's side ---------------------------------------------------------------------------


def launch(name: str, path: Path) -> None:
    """See that the training of a stage directory gets done by a job, and declare it.

    A base model that is imported is no training: it is fetched here, where there is a network.

    Raises:
        ClusterError: the job failed or was cancelled, or the scheduler refuses it.
        BudgetError: it does not fit into the allocation or a study's cap.
    """
    job = Job.open(name, path)
    if not (job.directory / LAUNCH).exists():
        run_stage(name, path)
        return
    with lock(job.directory / FOLDER, f"abf {name} --submit"):
        Launch(name, job, load_site()).finish()


class Launch:
    """A waiting rule."""

    def __init__(self, name: str, job: Job, site: SiteConfig) -> None:
        self.name, self.job, self.site = name, job, site
        self.directory, self.place = job.directory, f"{name}/{job.document['key']}"
        self.plan = LaunchConfig.model_validate_json((job.directory / LAUNCH).read_bytes())
        self.watch = Watch(job.results / ".driver", interval=site.poll_seconds)
        self._told = ""

    def finish(self) -> None:
        """Attach or submit, wait, again if need be, and declare."""
        while not self.job.finished():
            job_id = self._attached() or self._submit()
            try:
                state = self._wait(job_id)
            finally:
                self.watch.drop(job_id)
            if not self.job.finished():
                self._lost(job_id, state)
        declare(self.directory)
        self._say("finished; declared")

    @property
    def job_name(self) -> str:
        """Unique to this directory on this disk; survives what the id does not."""
        return f"{tag(self.job.results)}-{self.name}-{self.directory.name}"

    def _attached(self) -> str | None:
        """Id of this directory's live job, if there is one."""
        record = job_record(self.directory)
        job_id = record.get("job_id")
        if record and job_id is None:
            # The last process died between asking for the job and writing down its id.
            live = [found for found in slurm.queue(name=self.job_name) if found.live]
            if not live:
                return None
            job_id = live[0].job_id
            self._write(job_id, record.get("submissions", 1))
        if job_id is None or record.get("ended"):
            return None
        self._say(f"attached to job {job_id}, submitted before")
        return job_id

    def _submit(self) -> str:
        count = job_record(self.directory).get("submissions", 0) + 1
        executor = submitit.SlurmExecutor(folder=self.directory / FOLDER)
        executor.update_parameters(**self._parameters())
        # A driver that is itself a job must not hand on its own geometry.
        for variable in os.environ.keys() - slurm.clean_environment().keys():
            del os.environ[variable]
        with allow(
            job_node_hours(self.plan, self.site),
            place=self.place,
            job_name=self.job_name,
            results=self.job.results,
            site=self.site,
        ) as note:
            # From here on there may be a job whose id nobody has written down.
            self._write(None, count)
            try:
                submitted = executor.submit(TrainJob(self.name, str(self.directory)))
            except FailedJobError as error:
                raise ClusterError(
                    f"{self.job_name} was refused: {str(error).strip()} (account "
                    f"{self.site.account}, partition {self.site.partition}, QOS {self.site.qos}; "
                    "`abf doctor` checks them)"
                ) from error
            self._write(submitted.job_id, count)
            note(submitted.job_id)
        self._say(f"submitted as job {submitted.job_id}: {self.plan.nodes} node(s)")
        return submitted.job_id

    def _parameters(self) -> dict[str, Any]:
        site, plan = self.site, self.plan
        return {
            "job_name": self.job_name,
            "account": site.account,
            "partition": site.partition,
            "qos": site.qos,
            "time": min(plan.minutes, site.max_minutes),
            "nodes": plan.nodes,
            "ntasks_per_node": plan.ranks_per_node,
            "cpus_per_task": site.node.cores // plan.ranks_per_node,
            "gpus_per_node": site.node.gpus or None,
            "signal_delay_s": site.signal_seconds,
            "setup": list(site.setup),
            "srun_args": [
                "--kill-on-bad-exit=1",
                f"--cpus-per-task={site.node.cores // plan.ranks_per_node}",  # not inherited
            ],
            # A full node, whatever it is asked to hold: time and energy are measured on it.
            "exclusive": True,
            "additional_parameters": {
                "mem": 0,
                "requeue": True,
                "comment": launch_comment(self.place),
            },
        }

    def _wait(self, job_id: str) -> JobState:
        """Until the job has finished its work or ended otherwise, for good."""
        done = self.directory / ".done" / "manifest.json"
        while True:
            state = self.watch.wait(
                job_id, until=lambda s: done.exists() or self._given_up(s), each=self._show
            )
            if not (state.ended and state.state in RESUBMIT) or done.exists():
                return state
            if self._settled(job_id, state):
                return state

    def _settled(self, job_id: str, state: JobState) -> bool:
        """Whether an end stays one: Slurm requeues what a node or a preemption ended."""
        time.sleep(SETTLE_LOOKS * self.site.poll_seconds)
        now = self.watch.state(job_id)
        return now is not None and now.state == state.state

    def _given_up(self, state: JobState) -> bool:
        since = state.unknown_since
        return since is not None and time.time() - since > self.site.unknown_seconds

    def _lost(self, job_id: str, state: JobState) -> None:
        """The job ended without its work: go on when nobody wished it, else raise."""
        record = job_record(self.directory)
        write_job_record(self.directory, record | {"ended": state.state})
        if state.state == "COMPLETED":
            raise ClusterError(
                f"job {job_id} completed but left no finished manifest in {self.directory}; "
                f"{self._logs()}"
            )
        hung = state.state == "TIMEOUT" and checkpointed_step(self.directory) == record.get("step")
        if hung or _stuck(self.directory, job_id).exists():
            raise ClusterError(
                f"job {job_id} ended as {state.state}: {NO_PROGRESS}; {self._logs()}"
            )
        if state.state in RESUBMIT:
            self._say(f"job {job_id} ended as {state.state} ({state.reason}); submitting again")
            return
        why = "somebody cancelled it" if state.state == "CANCELLED" else self._last_reason()
        raise ClusterError(
            f"job {job_id} ended as {state.state}: {why}. Checkpoints are kept: the same command "
            f"goes on from the last one; {self._logs()}"
        )

    def _last_reason(self) -> str:
        attempts = read_attempts(self.directory)
        if not attempts:
            return "it never began"
        return str(attempts[-1].get("reason") or "no reason on record")

    def _logs(self) -> str:
        logs = (self.directory / FOLDER).glob("*_0_log.err")
        newest = max(logs, key=lambda path: path.stat().st_mtime, default=None)
        return f"its log: {newest}" if newest else "it wrote no log"

    def _write(self, job_id: str | None, submissions: int) -> None:
        # Where this job began, to tell whether it got anywhere.
        step = checkpointed_step(self.directory)
        record = {"job_id": job_id, "name": self.job_name, "submissions": submissions, "step": step}
        write_job_record(self.directory, record)

    def _show(self, state: JobState) -> None:
        trouble = self.watch.trouble()
        text = f"{state.state} {state.reason}".strip() + (f"; {trouble}" if trouble else "")
        if text != self._told:
            self._told = text
            self._say(text)

    def _say(self, text: str) -> None:
        print(f"{self.name} {self.directory.name}: {text}", file=sys.stderr, flush=True)
