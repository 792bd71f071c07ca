# The plan: which stage directories a study needs, from what, and with which configuration.
import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from abf.cluster.config import StorageConfig
from abf.driver import claim, adapt_executor
from abf.errors import AbfError, os_fault
from abf.grid import load_study
from abf.outside import check_outside
from abf.plan import Plan
from abf.retries import retry_only_what_was_ended
from abf.site import load_site, load_storage
from abf.stages import STAGES

STUDY = config.get("study") or os.environ.get("ABF_STUDY", "config/grids/demo.yaml")
RESULTS = Path(config.get("results") or os.environ.get("ABF_RESULTS", "results"))

# Jobs use the interpreter that runs Snakemake, whether or not its environment is activated.
# A signal to the whole group (Ctrl-C, a scheduler's SIGTERM) or a dead driver must not end the logger
# before the job: the job would then fail on a broken pipe instead of saving its state.
shell.prefix(
    f"set -euo pipefail; export PATH={shlex.quote(str(Path(sys.executable).parent))}:$PATH; "
    "keep() {{ trap '' INT TERM; exec tee -p \"$1\"; }}; "
)

DRY = {
    "-n",
    "-np",
    "--dry-run",
    "--dryrun",
    "--lint",
    "--summary",
    "--dag",
    "--rulegraph",
}
IS_DRIVER = workflow.is_main_process
IS_DRY = bool(DRY.intersection(sys.argv))
# On a cluster (profiles/leonardo sets this) training is a job of its own, and its rule only waits.
SUBMIT = bool(os.environ.get("ABF_SUBMIT"))

try:
    PLAN = Plan(load_study(Path(STUDY)), RESULTS)
    STORAGE = load_storage() if IS_DRIVER else StorageConfig()
    if IS_DRIVER:
        check_outside(PLAN.study)
    # What was submitted without an input that is gone would only find that out, on a paid node.
    PURGED = bool(STORAGE.work or STORAGE.scratch or (SUBMIT and IS_DRIVER))
    if PURGED:
        # Before the plan is written: what comes back has its own config.json, with its time.
        from abf.keep import bring_back

        bring_back(PLAN, STORAGE, dry=IS_DRY, submits=SUBMIT)
    PLAN.write()
except (AbfError, OSError) as error:
    raise WorkflowError(os_fault(error) or str(error))


def at(stage, name):
    """Path pattern of a file in a stage's directories."""
    return f"{RESULTS}/{stage}/{{key}}/{name}"


def log_of(stage):
    """Path pattern of the log of a stage's rule."""
    return f"{RESULTS}/logs/{stage}/{{key}}.log"


def version(stage):
    """Stage version; as a parameter it reruns the stage when it is bumped."""
    return STAGES[stage].version


wildcard_constraints:
    key=r"[A-Za-z0-9][A-Za-z0-9_.=+-]*",


onstart:
    try:
        claim(RESULTS, STUDY)
    except (AbfError, OSError) as error:
        raise WorkflowError(str(error))


def keep():
    """Copy what is finished to where nothing is purged."""
    if PURGED and not IS_DRY:
        from abf.keep import keep_finished

        keep_finished(PLAN, STORAGE)


onsuccess:
    keep()


onerror:
    from abf.so_far import end_with_books

    end_with_books(PLAN.report.directory(RESULTS))
    keep()


if SUBMIT:
    adapt_executor(RESULTS)
    retry_only_what_was_ended()
    if IS_DRIVER and not IS_DRY:
        # Heavier than planning, so only where it is needed.
        from abf.resume import take_over

        try:
            take_over(PLAN, load_site())
        except (AbfError, OSError) as error:
            raise WorkflowError(os_fault(error) or str(error))

    # Waiting, the network, and small reading of many files belong to the driver.
    localrules:
        base,
        fetch,
        ledger,
        mlflow,
        report,
        train,


keep()
