# The plan: which stage directories a study needs, from what, and with which configuration.
import os
import shlex
import sys
from pathlib import Path

from snakemake.exceptions import WorkflowError

from abf.driver import claim
from abf.errors import AbfError
from abf.grid import load_study
from abf.plan import Plan
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
except AbfError as error:
    raise WorkflowError(str(error))


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
    except AbfError as error:
        raise WorkflowError(str(error))
