"""Training as a job of the scheduler's: submit or re-attach, wait cheaply, declare what finished.

The rule's process is light and may die at any time: the job goes on, its id is in
`{directory}/job.json` (`abf.cluster.jobs`), and the next process attaches to it instead of
submitting again. On the job's side (`abf.rank`) every rank runs `TrainJob`; near the time limit all
save, and the first puts the job back into the queue under its own id, as often as it takes. The job
leaves its manifest undeclared (`.done/`); only the waiting rule gives it the name that Snakemake
looks for.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError

from abf.cluster import slurm
from abf.cluster.config import SiteConfig
from abf.cluster.jobs import OVER_BUDGET, job_record, launch_comment, tag, write_job_record
from abf.cluster.poll import UNKNOWN, JobState, Watch
from abf.commands import run_stage
from abf.errors import BudgetError, ClusterError
from abf.files import atomic_path, lock
from abf.instance import LAUNCH
from abf.job import Job
from abf.ledger.budget import job_node_hours
from abf.ledger.reserve import allow
from abf.rank import TrainJob, stuck_mark
from abf.site import load_site
from abf.stage import declare
from abf.track.attempts import read_attempts
from abf.track.endings import JOB, START, why_failed
from abf.track.pace import checkpointed_step

WORK = "work.pkl"
"""File in there: what a job runs, from before the job exists."""
RESUBMIT = frozenset({"NODE_FAIL", "BOOT_FAIL", "TIMEOUT", "PREEMPTED", UNKNOWN})
"""Ends that are nobody's wish and no fault of the training: it goes on from its checkpoint."""
NO_PROGRESS = (
    "a whole time limit went by without one more checkpoint, so that another would, too: raise "
    "launch.minutes, or lower signal_seconds of the site file if the warning comes too early"
)
SETTLE_LOOKS = 2
"""Looks at the queue before an end that Slurm may still turn into a requeue is believed."""


def launch(name: str, path: Path, *, accept: Sequence[str] = ()) -> None:
    """See that the training of a stage directory gets done by a job, and declare it.

    A base model that is imported is no training: it is fetched here, where there is a network.

    Args:
        accept: see `abf.commands.Job.accept`.

    Raises:
        ClusterError: the job failed or was cancelled, or the scheduler refuses it.
        BudgetError: it does not fit into the allocation or a study's cap.
    """
    job = Job.open(name, path, accept)
    if not (job.directory / LAUNCH).exists():
        run_stage(name, path)
        return

    def beside(holder: str) -> None:
        # Of a driver that was killed alone: its waiting rules live on, and do their work.
        print(f"{job.directory} is waited for by {holder}; after it", file=sys.stderr, flush=True)

    with lock(job.directory / JOB, f"abf {name} --submit", wait=beside):
        Launch(name, job, load_site()).finish()


class Launch:
    """A waiting rule."""

    def __init__(self, name: str, job: Job, site: SiteConfig) -> None:
        self.name, self.job, self.site = name, job, site
        self.directory, self.place = job.directory, f"{name}/{job.document['key']}"
        plan = job.launch()
        assert plan is not None, "only a training is launched"
        self.plan = plan
        self.watch = Watch(job.results / ".driver", interval=site.poll_seconds)
        self._told = ""

    def finish(self) -> None:
        """Attach or submit, wait, again if need be, and declare."""
        while not self.job.finished():
            try:
                job_id = self._attached() or self._submit()
            except BudgetError as error:
                before = {"job_id": None, "name": self.job_name} | job_record(self.directory)
                write_job_record(self.directory, before | {OVER_BUDGET: str(error)})
                raise
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
            told = record.keys() & {"refused", OVER_BUDGET}
            job_id = self._live_by_name(1 if told else 1 + SETTLE_LOOKS)
            if job_id is None:
                return None
            self._write(job_id, record.get("submissions", 1))
        if job_id is None or record.get("ended"):
            return None
        self._say(f"attached to job {job_id}, submitted before")
        return job_id

    def _live_by_name(self, looks: int) -> str | None:
        """Id of the job of our name in the queue; the dead process's sbatch may still bring it."""
        for look in range(looks):
            if look:
                time.sleep(self.site.poll_seconds)
            live = [found for found in slurm.queue(name=self.job_name) if found.live]
            if live:
                return live[0].job_id
        return None

    def _submit(self) -> str:
        count = job_record(self.directory).get("submissions", 0) + 1
        work = self._leave_work()
        executor = submitit.SlurmExecutor(folder=self.directory / JOB)
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
                submitted = executor.submit(work)
            except FailedJobError as error:
                refused = job_record(self.directory) | {"refused": str(error).strip()}
                write_job_record(self.directory, refused)
                raise ClusterError(
                    f"{self.job_name} was refused: {str(error).strip()} (account "
                    f"{self.site.account}, partition {self.site.partition}, QOS {self.site.qos}; "
                    "`abf doctor` checks them)"
                ) from error
            self._write(submitted.job_id, count)
            note(submitted.job_id)
        self._say(f"submitted as job {submitted.job_id}: {self.plan.nodes} node(s)")
        return submitted.job_id

    def _leave_work(self) -> TrainJob:
        """Leave what the job runs under a name that is known before the job is.

        Submitit names its pickle after the job once it knows the id: a process killed before that
        leaves a job without one. The job's own script gives this one the name (`_first_lines`).
        """
        folder, work = (
            self.directory / JOB,
            TrainJob(self.name, str(self.directory), self.job.accept),
        )
        # Of processes that were killed while submitting: nothing looks for them.
        for stray in (*folder.glob(f"{'?' * 32}.pkl"), *folder.glob("submission_file_*.sh")):
            stray.unlink()
        with atomic_path(folder / WORK) as temporary:
            submitit.helpers.DelayedSubmission(work).dump(temporary)
        return work

    def _first_lines(self) -> list[str]:
        """Shell lines at each start of the job, before the ranks."""
        folder = shlex.quote(str((self.directory / JOB).absolute()))
        return [
            f'ln -f {folder}/{WORK} {folder}/"$SLURM_JOB_ID"_submitted.pkl',
            f'echo "{START} ${{SLURM_RESTART_COUNT:-0}} on $SLURM_JOB_NODELIST" >&2',
        ]

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
            "setup": [*self._first_lines(), *site.setup],
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
        hung = state.state == "TIMEOUT" and checkpointed_step(self.directory) == record.get("step")
        if state.state == "COMPLETED":
            why = f"it left no finished manifest in {self.directory}"
        elif hung or stuck_mark(self.directory, job_id).exists():
            why = NO_PROGRESS
        elif state.state in RESUBMIT:
            why = ""
        elif state.state == "CANCELLED":
            began = any(r["job_id"] == job_id for r in read_attempts(self.directory))
            why = "somebody cancelled it" + ("" if began else " before it began")
        else:
            why = why_failed(self.directory, job_id, lambda: _exit_code(job_id))
        write_job_record(self.directory, record | {"ended": state.state, "why": why})
        if not why:
            told = f" ({state.reason})" if state.reason else ""
            self._say(f"job {job_id} ended as {state.state}{told}; submitting again")
            return
        step = checkpointed_step(self.directory)
        begin = f"goes on from the checkpoint of step {step}" if step else "begins at step 0"
        raise ClusterError(
            f"job {job_id} ended as {state.state}: {why}. The same command {begin}; "
            f"{self._log(job_id)}"
        )

    def _log(self, job_id: str) -> str:
        log = self.directory / JOB / f"{job_id}_0_log.err"
        return f"its log: {log}" if log.exists() else "it wrote no log"

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


def _exit_code(job_id: str) -> str:
    found = slurm.records([job_id]).get(job_id)
    return "none on record" if found is None else found.exit_code
