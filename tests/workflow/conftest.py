"""A micro study, run once for all tests of the workflow; each test works on its own copy."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
RESULTS = "the results"
"""With a space, as people have them."""
RUN = """
study: micro
sources: [{kind: stdlib, pattern: "[a-f]*.py", max_documents: 16}]
prepare: {heldout_fraction: 0.2}
tokenizer: {kind: trained, vocab_size: 400}
pack: {row_length: 64, max_block: 16}
base:
  kind: pretrain
  shape: {d_model: 16, layers: 1, heads: 2, kv_heads: 1, d_ff: 32}
  train: {objective: {kind: ar}, tokens: 2000, batch_rows: 4, precision: fp32, attention: reference}
train:
  tokens: 5000
  batch_rows: 4
  precision: fp32
  attention: reference
  checkpoint_steps: 2
  log_steps: 1
tasks:
  heldout: {kind: likelihood, max_rows: 4, samples: 1}
  go: {kind: continuation, prompts: 2, prompt_tokens: 8, new_tokens: 12}
decoders:
  half: {strategy: {kind: threshold, threshold: 0.5}, extent: {kind: length_head}, precision: fp32}
report: {generations: 1, bootstrap: 100}
"""
GRID = """
study: micro
base: run.yaml
arms:
  fixed: {segmenter: {kind: fixed, like: {kind: sentence}}}
  sentence: {}
seeds: [0]
"""


@dataclass(frozen=True)
class Project:
    """A working directory with a study and its results."""

    folder: Path

    @property
    def results(self) -> Path:
        return self.folder / RESULTS

    def command(self, *arguments: str, profile: bool = True) -> list[str]:
        """Snakemake on this study."""
        return [
            *(sys.executable, "-m", "snakemake", "-s", str(ROOT / "workflow" / "Snakefile")),
            *("-d", str(self.folder), *arguments),
            *(("--profile", str(ROOT / "profiles" / "local")) if profile else ()),
            # Relative, as people type it; Snakemake's records of a copied folder then stay true.
            *("--config", "study=grid.yaml", f"results={RESULTS}"),
        ]

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Run to the end; stdout and stderr in one text."""
        return subprocess.run(
            self.command(*arguments),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )

    def directory(self, stage: str, slug: str) -> Path:
        """The one stage directory whose key begins so."""
        (found,) = (self.results / stage).glob(f"{slug}*")
        return found


def write_study(folder: Path, grid: str = GRID, run: str = RUN) -> None:
    (folder / "run.yaml").write_text(run)
    (folder / "grid.yaml").write_text(grid)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """The micro study, run to the end; tests that change anything take a `copy`."""
    folder = tmp_path_factory.mktemp("micro")
    write_study(folder)
    project = Project(folder)
    done = project.run()
    assert done.returncode == 0, done.stdout[-6000:]
    return project


@pytest.fixture
def copy(finished: Project, tmp_path: Path) -> Project:
    """The finished study in a folder of its own, Snakemake's records included."""
    folder = tmp_path / "copy"
    shutil.copytree(finished.folder, folder, symlinks=True)
    return Project(folder)
