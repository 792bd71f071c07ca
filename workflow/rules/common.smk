# The plan: which stage directories a study needs, from what, and with which configuration.
import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from abf.driver import claim, notice_soon
from abf.errors import AbfError, os_fault
from abf.grid import load_study
from abf.plan import Plan
from abf.site import load_site
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

try:
    PLAN = Plan(load_study(Path(STUDY)), RESULTS)
    PLAN.write()
except (AbfError, OSError) as error:
    raise WorkflowError(os_fault(error) or str(error))


# On a cluster (profiles/leonardo sets this) training is a job of its own, and its rule only waits.
SUBMIT = bool(os.environ.get("ABF_SUBMIT"))
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


def at(stage, name):
    """Path pattern of a file in a stage's directories."""
    return f"{RESULTS}/{stage}/{{key}}/{name}"


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


if SUBMIT:
    notice_soon()
    if workflow.is_main_process and not DRY.intersection(sys.argv):
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
