"""A driver that outlives login nodes: Snakemake in a chain of short jobs on the serial partition.

`start` submits the first job; near its time limit each puts itself back into the queue under the
same id, until Snakemake has made everything or nothing can progress. Ending a driver ends no job it
waits for: trainings go on, and the next driver attaches to them. State is in
`{results}/.driver/drive.json`, everything printed in `drive.log` beside it.
"""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from abf.cluster import checks, slurm
from abf.cluster.config import SiteConfig
from abf.cluster.limits import store_limits
from abf.documents import parse_document
from abf.errors import ArtifactError, ClusterError, LockError
from abf.files import make_folder, write_json
from abf.grid import load_study
from abf.outside import check_outside
from abf.profile import require_snakefile
from abf.site import load_site

WARNING_SECONDS = 180
"""How long before its time limit a driver job is told to queue again."""
GRACE_SECONDS = 120
"""How long a requeued job waits to be ended by Slurm."""
TAIL_LINES = 15
# The reader of the pipe ends with whoever holds its other end: the driver's job, however that ends.
GUARDED = """\
exec 3<&0 </dev/null
{ read -r _; kill -KILL 0; } <&3 &
exec 3<&- "$@"
"""
"""Shell script: a command, and beside it a reader that ends their process group with its parent."""
ENDS = ("finished", "failed", "stopped")
"""States that a driver writes down when it ends by itself, or is ended by `stop`."""


class Drive:
    """The driver of one results folder."""

    def __init__(self, results: Path) -> None:
        self.folder = results / ".driver"
        self.results = results

    @property
    def log(self) -> Path:
        """Everything the driver prints, over all its jobs."""
        return self.folder / "drive.log"

    def record(self) -> dict[str, Any]:
        """Job, study, arguments and state of the newest driver; empty when there was none.

        Raises:
            ArtifactError: the file that says so is damaged.
        """
        path = self.folder / "drive.json"
        try:
            return parse_document(path, path.read_bytes()) if path.exists() else {}
        except ValueError as error:
            raise ArtifactError(
                f"{path} is damaged ({error}): look for a job abf-drive with `squeue --me`, cancel "
                "it, delete the file, and start again"
            ) from None

    def _write(self, **changes: Any) -> None:
        write_json(self.folder / "drive.json", self.record() | changes)

    def job(self) -> slurm.QueuedJob | None:
        """The driver's job, while it waits or runs."""
        job_id = self.record().get("job_id")
        live = [job for job in slurm.queue() if job.job_id == job_id and job.live]
        return live[0] if live else None

    # --- what a person types ---------------------------------------------------------------

    def start(self, study: Path, profile: str) -> str:
        """Submit the driver; returns its job id.

        Raises:
            ConfigError: the study cannot be run, no Snakefile is here, or the scheduler would
                refuse the site file's jobs.
            LockError: one is at work already; names it.
            ClusterError: the scheduler refuses it.
        """
        require_snakefile(Path.cwd())
        check_outside(load_study(study))
        if (job := self.job()) is not None:
            raise LockError(
                f"{self.results} is driven by job {job.job_id} ({job.state}, study "
                f"{self.record()['study']}): `abf drive status` shows it, `abf drive stop` ends it"
            )
        site = load_site()
        make_folder(self.folder)
        checks.refuse(checks.entry(site, store_limits(site, self.results), {}, checks.lanes(site)))
        command = [
            *("snakemake", "--profile", profile),
            *("--config", f"study={study}", f"results={self.results}"),
        ]
        job_id = slurm.call(*self._sbatch(site)).strip().partition(";")[0]
        self._write(
            job_id=job_id, study=str(study), command=command, state="submitted", since=time.time()
        )
        return job_id

    def _sbatch(self, site: SiteConfig) -> list[str]:
        inside = [sys.executable, "-m", "abf.cli", "drive", "run", "--results", str(self.results)]
        setup = "".join(f"{line}\n" for line in site.setup)
        return [
            *("sbatch", "--parsable", "--job-name=abf-drive", "--requeue", "--open-mode=append"),
            *(f"--account={site.account}", f"--partition={site.serial_partition}"),
            *(f"--qos={site.serial_qos}", f"--time={site.serial_minutes}"),
            *("--nodes=1", "--ntasks=1", "--cpus-per-task=1"),
            *(f"--signal=B:USR1@{WARNING_SECONDS}", f"--output={self.log}"),
            f"--wrap={setup}exec {shlex.join(inside)}",
        ]

    def stop(self) -> str:
        """End the driver; jobs it waits for go on. Returns its job id.

        Raises:
            ClusterError: there is none.
        """
        job = self.job()
        if job is None:
            raise ClusterError(f"no driver is at work on {self.results}")
        slurm.cancel([job.job_id])
        self._write(state="stopped")
        return job.job_id

    def status(self) -> str:
        """One paragraph: job, state, last lines of the log."""
        record = self.record()
        if not record:
            return f"{self.results} was never driven; `abf drive start STUDY` begins"
        job = self.job()
        if job is not None:
            reason = f" {job.reason}" if job.state in slurm.WAITING else ""
            now = f"{job.state}{reason}, {job.time_left} left"
        elif record["state"] in ENDS:
            now = record["state"]
        else:
            now = f"{record['state']} when last heard of, and gone: `abf drive start` goes on"
        lines = self.log.read_text(encoding="utf-8").splitlines() if self.log.exists() else []
        head = f"driver job {record['job_id']} on {record['study']}: {now}; log {self.log}"
        return "\n".join([head, *lines[-TAIL_LINES:]])

    def follow(self) -> None:
        """Print the log as it grows, until the driver has ended."""
        position = 0
        while True:
            over = self.job() is None
            if self.log.exists():
                with open(self.log, encoding="utf-8") as handle:
                    handle.seek(position)
                    print(handle.read(), end="", flush=True)
                    position = handle.tell()
            if over:
                return
            time.sleep(5)

    # --- the job ---------------------------------------------------------------------------

    def run(self) -> int:
        """Run Snakemake inside the driver's job; returns its exit code."""
        self._write(state="running", job_id=os.environ["SLURM_JOB_ID"])
        # A session of its own, so that one signal ends it with all its waiting rules. Killed
        # ourselves, we send none: where no cgroup ends them either, the reader of the pipe does.
        reading, _held = os.pipe()
        child = subprocess.Popen(
            ["sh", "-c", GUARDED, "sh", *self.record()["command"]],
            stdin=reading,
            start_new_session=True,
        )
        asked: list[int] = []

        def note(number: int, _frame: FrameType | None) -> None:
            asked.append(number)
            # Not an interrupt: that would make Snakemake cancel its jobs in the queue.
            os.killpg(child.pid, signal.SIGKILL)

        for number in (signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, note)
        code = child.wait()
        if not asked:
            self._write(state="finished" if code == 0 else "failed")
            return code
        if asked[0] == signal.SIGUSR1:
            print("driver: time is up, queueing again", flush=True)
            self._write(state="requeued")
            slurm.requeue(os.environ["SLURM_JOB_ID"])
            time.sleep(GRACE_SECONDS)
        return 75
