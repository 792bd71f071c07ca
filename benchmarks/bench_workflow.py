"""Dry-run of a 1,000-job grid against a toy workflow of as many jobs, interleaved wall clock."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

from abf.grid import load_study
from abf.plan import Plan
from benchmarks.statistics import Row, ratio_row

ROOT = Path(__file__).parents[1]
TOY = """
CELLS = [str(i) for i in range({cells})]
rule all:
    input: expand("toy/{{cell}}.d", cell=CELLS)
rule a:
    output: "toy/{{cell}}.a"
    shell: "touch {{output}}"
rule b:
    input: "toy/{{cell}}.a"
    output: "toy/{{cell}}.b"
    shell: "touch {{output}}"
rule c:
    input: "toy/{{cell}}.b"
    output: "toy/{{cell}}.c"
    shell: "touch {{output}}"
rule d:
    input: "toy/{{cell}}.c"
    output: "toy/{{cell}}.d"
    shell: "touch {{output}}"
"""


def _grid(folder: Path, jobs: int) -> tuple[Path, int]:
    """A grid of about that many jobs, and how many it has."""
    base = os.path.relpath(ROOT / "config" / "tiny.yaml", folder)
    document = yaml.safe_load((ROOT / "config" / "grids" / "demo.yaml").read_text())
    path = folder / "grid.yaml"
    for seeds in range(1, jobs):
        path.write_text(yaml.safe_dump(document | {"base": base, "seeds": list(range(seeds))}))
        count = len(Plan(load_study(path), folder / "results").instances) + 1
        if count >= jobs:
            return path, count
    raise AssertionError("a grid grows with its seeds")


def _dry_run(folder: Path, snakefile: Path, *arguments: str) -> float:
    command = [sys.executable, "-m", "snakemake", "-n", "-q", "all", "-s", str(snakefile)]
    began = time.perf_counter()
    subprocess.run(
        [*command, "-d", str(folder), *arguments], check=True, capture_output=True, text=True
    )
    return time.perf_counter() - began


def run(quick: bool = False) -> list[Row]:
    """Rows of the benchmark table."""
    rounds, jobs = (2, 100) if quick else (7, 1000)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        grid, count = _grid(folder, jobs)
        toy = folder / "Toyfile"
        toy.write_text(TOY.format(cells=count // 4))
        ours, theirs = [], []
        for _ in range(rounds):
            theirs.append(_dry_run(folder, toy))
            # The first round also writes every config.json; the median is of planned grids.
            arguments = ("--config", f"study={grid}", f"results={folder / 'results'}")
            ours.append(_dry_run(folder, ROOT / "workflow" / "Snakefile", *arguments))
    detail = f"{count} jobs; goal at most 1.3"
    return [ratio_row("dry-run wall time, project / toy workflow", ours, theirs, detail)]
