"""Ask the scheduler and a compute node: jobs on trial, and one real job of seconds.

Memory is all of a node's, times are minutes unless named otherwise.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from abf.cluster import slurm
from abf.cluster.checks import Finding, fail, ok, warn
from abf.cluster.config import LaunchConfig, SiteConfig
from abf.cluster.limits import Limits
from abf.errors import ClusterError

DEBUG_QOS = "boost_qos_dbg"
DEBUG_MINUTES = 5
"""It ends in seconds, but importing torch from a cold parallel file system can take minutes."""
JOB_WAIT_S = 900.0
"""A debug job that has not started by then tells that the queue is long, and nothing more."""
PROBE = """\
echo "abf host=$(hostname)"
echo "abf visible=${CUDA_VISIBLE_DEVICES:-}"
command -v nvidia-smi >/dev/null && echo "abf listed=$(nvidia-smi -L | grep -c '^GPU')"
"""
PYTHON_PROBE = "import torch; print(f'abf torch={torch.__version__} {torch.cuda.device_count()}')"


def accepted(site: SiteConfig, plans: list[LaunchConfig]) -> Iterator[Finding]:
    """The scheduler's own word: every kind of job is handed in for trial only."""
    trials = [
        (
            "the driver",
            [
                *(f"--partition={site.serial_partition}", f"--qos={site.serial_qos}"),
                *(f"--time={site.serial_minutes}", "--nodes=1", "--ntasks=1"),
            ],
        )
    ]
    trials += [
        (f"a training on {p.nodes} node(s)", full_nodes(site, p.nodes, p.minutes, site.qos))
        for p in plans
    ]
    for what, options in trials:
        try:
            slurm.call(
                *("sbatch", "--test-only", f"--account={site.account}", *options, "--wrap=true")
            )
        except ClusterError as error:
            said = str(error).partition(": ")[2].replace("\n", "; ")
            yield fail("trial", f"{what} is refused ({' '.join(options)}): {said}")
            return
    yield ok("trial", f"the scheduler takes {' and '.join(what for what, _ in trials)}")


def full_nodes(site: SiteConfig, nodes: int, minutes: int, qos: str) -> list[str]:
    """sbatch options for whole nodes."""
    return [
        *(f"--partition={site.partition}", f"--qos={qos}", f"--nodes={nodes}", "--exclusive"),
        *([f"--gpus-per-node={site.node.gpus}"] if site.node.gpus else []),
        *("--mem=0", f"--time={min(minutes, site.max_minutes)}"),
    ]


def debug_job(site: SiteConfig, limits: Limits, results: Path) -> Iterator[Finding]:
    """Submit a job of seconds on one node and report what it saw there."""
    rights = {name for a in limits.rights(site.account, site.partition) for name in a.qos}
    qos = DEBUG_QOS if DEBUG_QOS in rights else site.qos
    log = (results / ".driver" / "doctor-%j.log").absolute()
    python = f"{shlex.quote(sys.executable)} -c {shlex.quote(PYTHON_PROBE)}"
    script = "\n".join([*site.setup, PROBE + python])
    try:
        said = slurm.call(
            *("sbatch", "--parsable", "--job-name=abf-doctor", "--no-requeue"),
            *(f"--account={site.account}", *full_nodes(site, 1, DEBUG_MINUTES, qos)),
            *(f"--output={log}", f"--wrap={script}"),
        )
        job_id = said.strip().partition(";")[0]
        state = _wait(job_id, pause=min(2.0, site.poll_seconds))
    except ClusterError as error:
        yield fail("job", str(error))
        return
    yield judge(site, job_id, qos, state, Path(str(log).replace("%j", job_id)))


def _wait(job_id: str, *, pause: float) -> str:
    """State of the job once it has ended; what waits too long is cancelled."""
    state, end = "PENDING", time.monotonic() + JOB_WAIT_S
    try:
        while state not in slurm.ENDED and time.monotonic() < end:
            time.sleep(pause)
            found = [job.state for job in slurm.queue() if job.job_id == job_id]
            found = found or [record.state for record in slurm.records([job_id]).values()]
            state = (found or [state])[0]
        return state
    finally:
        if state not in slurm.ENDED:
            slurm.cancel([job_id])


def judge(site: SiteConfig, job_id: str, qos: str, state: str, log: Path) -> Finding:
    """What the debug job's log says of the node's GPUs and the environment there."""
    if state not in slurm.ENDED:
        return warn(
            "job", f"job {job_id} ({qos}) was {state} after {JOB_WAIT_S:.0f} s and was cancelled"
        )
    end = time.monotonic() + 30
    while not log.exists() and time.monotonic() < end:  # Lustre shows new files late
        time.sleep(1)
    text = log.read_text(encoding="utf-8", errors="replace") if log.exists() else ""
    said = dict(re.findall(r"^abf (\w+)=(.*)$", text, flags=re.MULTILINE))
    where = f"job {job_id} ({qos}) on {said.get('host', 'a node')}"
    if state != "COMPLETED" or "torch" not in said:
        return fail("job", f"{where} ended as {state}: {text.strip()[-300:] or 'no log'} ({log})")
    visible = [word for word in said["visible"].split(",") if word]
    torch, _, seen = said["torch"].rpartition(" ")
    text = f"{where}: {len(visible)} GPUs in CUDA_VISIBLE_DEVICES, torch {torch} sees {seen}"
    if len(visible) != site.node.gpus:
        return fail("job", f"{text}; node.gpus={site.node.gpus}: correct the site file")
    if "listed" not in said and site.node.gpus:
        return warn("job", f"{text}; no nvidia-smi there, so whether they are real is not known")
    text += f", nvidia-smi lists {said.get('listed', '0')}"
    if {int(seen), int(said.get("listed", "0"))} != {site.node.gpus}:
        return fail(
            "job", f"{text}: take the CUDA build of torch, or `module load cuda` in `setup`"
        )
    return ok("job", text)
