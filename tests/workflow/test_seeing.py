"""`abf status` and `abf why` on a real study: Snakemake's own dry-run is the oracle of `why`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from abf.seeing.look import look
from abf.seeing.planned import read_planned
from abf.seeing.rerun import Rerun
from abf.stages import STAGES
from abf.track.attempts import read_attempts
from tests.workflow.conftest import GRID, RESULTS, RUN, Project, write_study
from tests.workflow.test_workflow import long_training, start, wait_for


def dry_run(project: Project, bumped: str = "") -> set[str]:
    """Places that Snakemake says it would run; `bumped`: a stage of another version."""
    code = (
        "import dataclasses, sys\nfrom abf.stages import STAGES\n"
        f"name = {bumped!r}\n"
        "if name: STAGES[name] = dataclasses.replace(STAGES[name], version=99)\n"
        "from snakemake.cli import main\nmain(sys.argv[1:])"
    )
    arguments = project.command("-n", "--nolock", "--cores", "1", profile=False)[3:]
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]
    return set(re.findall(rf"^    output: {RESULTS}/(.*?)/manifest\.json", done.stdout, re.M))


def rerun(project: Project) -> Rerun:
    return Rerun(read_planned(project.results, project.folder / "grid.yaml"))


def no_manifest(project: Project, stage: str, slug: str, *, finished: bool) -> None:
    directory = project.directory(stage, slug)
    (directory / "manifest.json").unlink()
    if not finished:
        (directory / ".done" / "manifest.json").unlink()


CHANGES = {
    "nothing": lambda p: None,
    "seed": lambda p: write_study(p.folder, GRID.replace("[0]", "[0, 1]")),
    "lr": lambda p: write_study(
        p.folder, GRID.replace("sentence: {}", "sentence: {train.optim.lr: 0.01}")
    ),
    "decoder": lambda p: write_study(
        p.folder, GRID, RUN.replace("threshold: 0.5", "threshold: 0.7")
    ),
    "report": lambda p: write_study(
        p.folder, GRID, RUN.replace("generations: 1", "generations: 2")
    ),
    "missing in the middle": lambda p: no_manifest(p, "tokenize", "tokens", finished=False),
    "missing and read": lambda p: (
        no_manifest(p, "train", "sentence", finished=True),
        no_manifest(p, "score", "fixed", finished=False),
        write_study(p.folder, GRID, RUN.replace("threshold: 0.5", "threshold: 0.7")),
    ),
    "no target": lambda p: (p.results / "report" / "micro" / "manifest.json").unlink(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_will_run_is_what_snakemake_would_run(copy: Project, change: str) -> None:
    CHANGES[change](copy)
    expected = rerun(copy).needed
    assert dry_run(copy) == expected


def test_a_version_and_an_input_made_again(copy: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as context:
        context.setitem(STAGES, "pack", replace(STAGES["pack"], version=99))
        assert dry_run(copy, "pack") == rerun(copy).needed
    (copy.directory("segment", "fixed") / ".done" / "manifest.json").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "abf.cli", "segment", str(copy.directory("segment", "fixed"))],
        cwd=copy.folder, env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0
    assert dry_run(copy) == rerun(copy).needed != frozenset()


def test_an_input_that_nobody_makes_again_is_told_before_and_made_by_hand(copy: Project) -> None:
    """Snakemake sees only the nearest inputs: segments hide that their tokens are gone."""
    no_manifest(copy, "tokenize", "tokens", finished=False)
    write_study(copy.folder, GRID, RUN.replace("max_block: 16", "max_block: 12"))
    said = abf(copy, "why", "pack", "grid.yaml")
    place = f"tokenize/{copy.directory('tokenize', 'tokens').name}"
    assert f"will stop at its input {place}: it has no manifest" in said
    command = re.search(r"`abf (tokenize) '(.*?)'` makes it again", said)
    assert command is not None
    abf(copy, command[1], command[2], results=False)
    assert "will stop" not in abf(copy, "why", "pack", "grid.yaml")


def abf(project: Project, *arguments: str, results: bool = True) -> str:
    below = ["--results", RESULTS] if results else []
    done = subprocess.run(
        [sys.executable, "-m", "abf.cli", *arguments, *below],
        cwd=project.folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_finished_study_on_one_screen(finished: Project) -> None:
    said = abf(finished, "status")
    assert said.startswith("micro: 2 cells, grid.yaml\n20 of 20 stage directories done")
    assert "to come  nothing" in said
    assert "failed  " not in said.partition("to come")[2]
    assert " core-hours in 20 attempts" in said
    assert len(said.splitlines()) <= 24
    # Training, decoding and score: one verdict.
    said = abf(finished, "why", "sentence-s0")
    assert said.startswith("train/sentence-s0-")
    assert said.count(", ") >= 2
    assert said.count("will not run: it was finished") == 1


def test_a_training_at_work_then_killed(copy: Project) -> None:
    directory = long_training(copy, 200_000)
    place = f"train/{directory.name}"
    process = start(copy)
    journal = directory / "journal.jsonl"
    wait_for(lambda: journal.exists() and b'"tokens_per_s"' in journal.read_bytes(), process)
    said = abf(copy, "status")
    number = read_attempts(directory)[-1]["pid"]
    assert f"{place}  process {number} on " in said
    assert re.search(r"step \d+/782 \(\d+ %\), \d+ \w+ left, [\d,]+ tokens/s", said)
    assert f"driver   snakemake on grid.yaml, process {process.pid} on " in said
    assert f"{place} is at work: attempt 1, process {number}" in abf(copy, "why", place)
    os.kill(number, signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode != 0, output
    found = look(read_planned(copy.results, None))
    assert found.states[place] == "failed"
    assert found.failure is not None
    assert found.failure.log == copy.results / "logs" / f"{place}.log"
    said = abf(copy, "why", place, "grid.yaml")
    assert "attempt 1 was KILLED: ended without a closing record" in said
    assert "train.tokens: 5000 -> 200000" in said
