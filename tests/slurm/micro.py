"""A micro study whose data and base model are made once; a cluster is asked for the rest."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

from tests.slurm.box import Box
from tests.workflow import conftest as workflow
from tests.workflow.conftest import ROOT

RUN = (
    workflow.RUN.replace("batch_rows: 4", "batch_rows: 8").replace("tokens: 5000", "tokens: 2560")
    + "launch: {nodes: 2, ranks_per_node: 4, minutes: 5}\n"
)
"""The workflow tests' study, with a row for each of eight ranks; its training takes 5 steps."""
LONG = RUN.replace("tokens: 2560", "tokens: 500_000").replace(
    "ranks_per_node: 4", "ranks_per_node: 1"
)
"""About 1,000 steps: long enough to be met at work. Two ranks: eight share two cores here."""
SITE = """
account: euhpc_test
poll_seconds: 1
signal_seconds: 30
unknown_seconds: 5
"""


class Study:
    """A working folder whose data and base model are made; trainings go to the box."""

    def __init__(self, folder: Path, box: Box) -> None:
        self.folder, self.box = folder, box
        (folder / "site.yaml").write_text(SITE)
        self.env = box.env | {"ABF_SITE": str(folder / "site.yaml"), "OMP_NUM_THREADS": "1"}
        self.abf = (sys.executable, "-m", "abf.cli")

    def plan(self, run: str) -> Path:
        """Plan this run file; the training's directory."""
        (self.folder / "run.yaml").write_text(run)
        return self._plan("run.yaml")[0]

    def _plan(self, study: str) -> list[Path]:
        done = subprocess.run(
            [*self.abf, "plan", study],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
        plan = json.loads((self.folder / "results/plan/micro.json").read_text())
        return [self.folder / "results" / cell["train"] for cell in plan["cells"]]

    def plan_grid(self, run: str, grid: str) -> list[Path]:
        """Plan a grid on this run file; its cells' trainings."""
        self.plan(run)
        return self._plan(grid)

    def command(self, directory: Path) -> list[str]:
        return [*self.abf, "train", str(directory.relative_to(self.folder)), "--submit"]

    def start(self, directory: Path) -> subprocess.Popen[str]:
        """A waiting process."""
        return subprocess.Popen(
            self.command(directory), cwd=self.folder, env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip

    def run(self, directory: Path) -> subprocess.CompletedProcess[str]:
        """Wait for the training."""
        return subprocess.run(
            self.command(directory), cwd=self.folder, env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip


def prepare(folder: Path, box: Box) -> Study:
    """Everything before training, made on this machine."""
    study = Study(folder, box)
    inputs = json.loads((study.plan(RUN) / "config.json").read_text())["inputs"]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow" / "Snakefile")),
            *("--profile", str(ROOT / "profiles" / "local"), "--config", "study=run.yaml"),
            *("--", *(f"results/{place}/manifest.json" for place in inputs.values())),
        ],
        cwd=study.folder, env=study.env, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return study


def copied(study: Study, folder: Path) -> Study:
    """A copy of one's own, times of files included."""
    shutil.copytree(study.folder, folder, copy_function=shutil.copy2)
    return Study(folder, study.box)
