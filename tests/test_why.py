"""Why a directory runs or not, in keys, versions and places, on a small plan's directories."""

from __future__ import annotations

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from abf.errors import ConfigError
from abf.grid import load_study
from abf.instance import Instance
from abf.plan import Plan
from abf.seeing.planned import read_planned
from abf.stage import declare, stage
from abf.stages import MANIFEST, STAGES
from abf.why import Why, show_why

RUN = """
study: base
sources: [{kind: local, path: text.jsonl}]
pack: {row_length: 64, max_block: 16}
train: {precision: fp32, optim: {lr: 0.1}}
base: {kind: pretrain, train: {objective: {kind: ar}, precision: fp32}}
tasks: {go: {kind: continuation, prompt_tokens: 8, new_tokens: 8}}
decoders:
  a: {strategy: {kind: threshold, threshold: 0.5}, extent: {kind: length_head}, precision: fp32}
"""
GRID = """
study: grid
base: run.yaml
arms:
  fixed: {segmenter: {kind: fixed, like: {kind: sentence}}}
  sentence: {}
"""


def write(folder: Path, grid: str = GRID, run: str = RUN) -> Path:
    (folder / "run.yaml").write_text(run)
    (folder / "grid.yaml").write_text(grid)
    return folder / "grid.yaml"


def finish(instance: Instance, results: Path, text: str = "x") -> Path:
    """Do the work of a stage directory: a payload of small files, and a real manifest."""
    directory = instance.directory(results)
    inputs = {
        name: [i.directory(results) for i in (up if isinstance(up, list) else [up])]
        for name, up in instance.inputs.items()
    }
    config = directory / "config.json"
    with stage(instance.stage, directory, inputs=inputs, config=config) as run:
        for name in STAGES[instance.stage].payload:
            (run.staging / name).write_text(text)
    return directory


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The grid's folder, everything finished."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "text.jsonl").write_text("{}")
    before = Path.cwd()
    os.chdir(folder)  # sources are relative
    try:
        plan = Plan(load_study(write(folder)), Path("results"))
        plan.write()
        for instance in plan.instances.values():  # in the order of their inputs
            finish(instance, plan.results)
    finally:
        os.chdir(before)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    shutil.copytree(made, tmp_path / "study")
    monkeypatch.chdir(tmp_path / "study")
    return tmp_path / "study"


RESULTS = Path("results")


def why() -> Why:
    """By the study file as it now is."""
    return Why(read_planned(RESULTS, Path("grid.yaml")))


def place(stage_name: str, slug: str = "") -> str:
    """The one planned directory of that stage whose key begins so."""
    places = why().planned.places
    (found,) = [p for p in places if p.startswith(f"{stage_name}/{slug}")]
    return found


def explain(target: str) -> str:
    found = why()
    return "\n".join(line for p in found.find(target) for line in found.explain(p))


def test_finished_work_is_left_alone(folder: Path) -> None:
    assert why().rerun.needed == frozenset()
    said = explain("sentence-s0")
    assert said.count(" will not run: it was finished 20") == 3  # train, decode, score
    assert "will run" not in said


def test_a_stage_version_is_the_root_cause_of_what_follows(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(STAGES, "convert", replace(STAGES["convert"], version=7))
    assert explain("convert").endswith("will run\n  version of stage convert: 2 -> 7")
    score = explain(place("score", "fixed")).splitlines()
    assert score[1:] == [f"  because of {place('convert')}: version of stage convert: 2 -> 7"]
    assert "will not run" in explain("pack")


def test_another_learning_rate_names_key_and_nearest(folder: Path) -> None:
    before = place("train", "sentence")
    write(folder, GRID.replace("sentence: {}", "sentence: {train.optim.lr: 0.2}"))
    train = place("train", "sentence")
    assert train != before
    assert explain(train).splitlines() == [
        f"{train} will run",
        "  never run",
        f"  nearest finished one: {before}, with other keys (there -> here)",
        "    train.optim.lr: 0.1 -> 0.2",
    ]
    assert f"because of {train}: never run" in explain(place("decode", "sentence"))
    said = explain(place("score", "sentence"))
    assert said.count("because of") == 1  # the decoding only waits for it, too
    assert f"because of {train}: never run" in said
    assert "train.optim.lr: 0.1 -> 0.2" in said
    assert "will not run" in explain("fixed-s0")


def test_what_is_no_longer_planned_says_what_is(folder: Path) -> None:
    before = place("train", "sentence")
    write(folder, GRID.replace("sentence: {}", "sentence: {train.optim.lr: 0.2}"))
    for target in (before, f"results/{before}", f"results/{before}/manifest.json"):
        said = explain(target)
        assert f"{before} will not run: it is not planned by grid.yaml (finished 20" in said
        assert f"nearest planned one: {place('train', 'sentence')}" in said
        assert "(there -> here)\n    train.optim.lr: 0.2 -> 0.1" in said


def test_a_decoders_and_a_tasks_keys_are_those_of_the_study_file(folder: Path) -> None:
    write(folder, GRID, RUN.replace("threshold: 0.5", "threshold: 0.7"))
    assert "decoders.a.strategy.threshold: 0.5 -> 0.7" in explain("decode")
    assert "decoders.a.strategy.threshold: 0.5 -> 0.7" in explain("score")
    write(folder, GRID, RUN.replace("new_tokens: 8", "new_tokens: 9"))
    assert "tasks.go.new_tokens: 8 -> 9" in explain("decode")


def test_a_new_seed_is_nearest_to_the_old_one_and_a_key_above_is_found(folder: Path) -> None:
    write(folder, GRID + "seeds: [3]\n")
    assert "seed: 0 -> 3" in explain(place("train", "fixed"))
    write(folder, GRID, RUN.replace("max_block: 16", "max_block: 12"))
    assert "pack.max_block: 16 -> 12" in explain(place("train", "fixed"))


def test_another_cell_changes_what_the_ledger_collects(folder: Path) -> None:
    write(folder, GRID + "seeds: [0, 1]\n")
    scores = f"input scores: + {place('score', 'fixed-s1')}"
    assert scores in explain("ledger")
    trains = f"{place('train', 'fixed-s1')}, {place('train', 'sentence-s1')}"
    assert f"because of {trains}: never run" in explain("ledger")
    # Writing the plan replaces config.json; what the ledger was made with is kept beside.
    Plan(load_study(Path("grid.yaml")), RESULTS).write()
    assert scores in explain("ledger")


def test_an_input_that_was_made_again(folder: Path) -> None:
    plan = Plan(load_study(Path("grid.yaml")), RESULTS)
    finish(plan.cells[0].pack, RESULTS, "another")
    train, pack = plan.cells[0].train.place, plan.cells[0].pack.place
    assert f"  input {pack} was made again after it was read" in explain(train)
    assert f"because of {train}: input {pack} was made again" in explain(
        next(iter(plan.cells[0].decodes.values())).place
    )


def test_an_input_that_was_made_again_alike(folder: Path) -> None:
    plan = Plan(load_study(Path("grid.yaml")), RESULTS)
    train, pack = plan.cells[0].train, plan.cells[0].pack
    shutil.rmtree(pack.directory(RESULTS) / ".done")
    finish(pack, RESULTS)
    assert f"{train.place} will only be declared: its work was finished" in explain(train.place)
    declare(train.directory(RESULTS))
    assert f"{train.place} will not run" in explain(train.place)


def test_a_file_from_outside(folder: Path) -> None:
    later = (RESULTS / place("fetch") / MANIFEST).stat().st_mtime + 60
    os.utime("text.jsonl", (later, later))
    assert "file text.jsonl from outside was written after it was read" in explain("fetch")
    assert f"because of {place('fetch')}: file text.jsonl from outside" in explain("tokenize")


@pytest.mark.parametrize("damage", ["missing", "shorter", "changed"])
def test_damage_is_named_with_what_to_do(folder: Path, damage: str) -> None:
    packed = RESULTS / place("convert")
    payload = packed / "init"
    if damage == "missing":
        payload.unlink()
    else:
        payload.write_text("" if damage == "shorter" else "y")
    said = explain("convert")
    expected = {
        "missing": "init is missing",
        "shorter": "init has 0 bytes, its manifest says 1",
        "changed": "init was changed after it was written",
    }[damage]
    assert "will not run: it was finished" in said
    assert f"but {payload.parent}/{expected}" in said
    assert f"`abf convert {packed}` makes it again" in said
    write(folder, GRID.replace("sentence: {}", "sentence: {train.optim.lr: 0.2}"))
    train = explain(place("train", "sentence"))
    assert f"will stop at its input {place('convert')}: {payload.parent}/{expected}" in train


def test_missing_manifests_in_the_middle_run_only_when_read(folder: Path) -> None:
    tokens = RESULTS / place("tokenize")
    (tokens / MANIFEST).unlink()
    assert "it has no manifest, but nothing that is to run reads it" in explain("tokenize")
    segments = RESULTS / place("segment", "sentence")
    (segments / MANIFEST).unlink()
    write(folder, GRID, RUN.replace("max_block: 16", "max_block: 12"))
    # Finished and only not declared: nothing is computed twice.
    assert "will only be declared: its work was finished 20" in explain("segment/sentence")
    declare(segments)
    assert why().rerun.standing(place("segment", "sentence")).declared


def test_an_unfinished_attempt_tells_its_end(folder: Path) -> None:
    write(folder, GRID.replace("sentence: {}", "sentence: {train.optim.lr: 0.2}"))
    plan = Plan(load_study(Path("grid.yaml")), RESULTS)
    plan.write()
    train = plan.cells[1].train
    with pytest.raises(ZeroDivisionError), stage("train", RESULTS / train.place, inputs={},
                                                 config=None):  # fmt: skip
        _ = 1 / 0
    (RESULTS / train.place / "ckpt" / "step-000020").mkdir(parents=True)
    said = explain(train.place)
    assert "attempt 1 was FAILED: ZeroDivisionError: division by zero" in said
    assert "it goes on from step-000020" in said
    with stage("train", RESULTS / train.place, inputs={}, config=None) as run:
        assert f"is at work: attempt 2, process {os.getpid()} on " in explain(train.place)
        for name in STAGES["train"].payload:
            (run.staging / name).touch()


def test_work_from_before_configurations_were_kept(folder: Path) -> None:
    """Its own file still says it where that is the one the manifest was made with."""
    report = RESULTS / place("report")
    (report / ".done" / "config.json").unlink()
    write(folder, GRID, RUN + "report: {generations: 9}\n")
    assert "report.generations: " in explain("report")
    Plan(load_study(Path("grid.yaml")), RESULTS).write()
    assert "with which one it was made is not on record" in explain("report")


def test_the_plans_on_disk_are_asked_where_no_study_is_named(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    show_why("fixed-s0", RESULTS, None)
    said = capsys.readouterr().out
    places = why().find("fixed-s0")
    assert said.startswith(f"{', '.join(places)} will not run: it was finished with the stage ver")
    assert "name the study file" in said


def test_targets_that_are_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'sentense-s0' is no .*near it: sentence-s0"):
        explain("sentense-s0")
    with pytest.raises(ConfigError, match="holds no plan: name the study file"):
        show_why("train", tmp_path / "nothing", None)


def test_nothing_is_written(folder: Path) -> None:
    def look() -> dict[str, int]:
        return {str(p): p.stat().st_mtime_ns for p in Path().rglob("*")}

    write(folder, GRID + "seeds: [0, 1]\n")
    before = look()
    for target in (*STAGES, "fixed-s1"):
        explain(target)
    assert look() == before
