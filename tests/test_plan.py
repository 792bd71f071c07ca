"""What a change of configuration reruns: keys hash only what their chain reads."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from abf.errors import ConfigError
from abf.grid import Study, load_study
from abf.plan import Plan

ROOT = Path(__file__).parents[1]
RUN = """
study: base
sources: [{kind: local, path: text.jsonl}]
pack: {row_length: 64, max_block: 16}
tasks: {heldout: {kind: likelihood}, go: {kind: continuation, prompt_tokens: 8, new_tokens: 8}}
decoders: {a: {strategy: {kind: ar}}}
"""
GRID = """
study: grid
base: run.yaml
arms:
  fixed: {segmenter: {kind: fixed, like: {kind: sentence}}}
  sentence: {}
seeds: [0, 1]
"""


def study(folder: Path, grid: str = GRID, run: str = RUN) -> Study:
    (folder / "run.yaml").write_text(run)
    (folder / "grid.yaml").write_text(grid)
    return load_study(folder / "grid.yaml")


def keys(plan: Plan) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for stage, key in plan.instances:
        found.setdefault(stage, set()).add(key)
    return found


def test_equal_work_is_planned_once(tmp_path: Path) -> None:
    plan = keys(Plan(study(tmp_path), tmp_path / "results"))
    counts = {stage: len(found) for stage, found in plan.items()}
    assert counts == {
        "fetch": 1,
        "prepare": 1,
        "tokenizer": 1,
        "tokenize": 1,
        "segment": 2,
        # The arms' rows, and the rows that every arm's base is trained on (default block cap).
        "pack": 3,
        "base": 1,
        "convert": 1,
        "train": 4,
        "decode": 4,
        "score": 4,
        "ledger": 1,
        "report": 1,
        "mlflow": 1,
    }


def test_a_new_seed_adds_only_its_own_cells(tmp_path: Path) -> None:
    before = keys(Plan(study(tmp_path), tmp_path))
    after = keys(Plan(study(tmp_path, GRID.replace("[0, 1]", "[0, 1, 2]")), tmp_path))
    new = {stage: found - before[stage] for stage, found in after.items()}
    assert {stage: len(found) for stage, found in new.items() if found} == {
        "train": 2,
        "decode": 2,
        "score": 2,
    }
    assert all(before[stage] <= after[stage] for stage in before)


def test_a_learning_rate_moves_training_and_nothing_before_it(tmp_path: Path) -> None:
    before = keys(Plan(study(tmp_path), tmp_path))
    changed = GRID.replace("sentence: {}", "sentence: {train.optim.lr: 0.5}")
    after = keys(Plan(study(tmp_path, changed), tmp_path))
    same = {stage for stage in before if before[stage] == after[stage]}
    assert same == {
        "fetch", "prepare", "tokenizer", "tokenize", "segment", "pack", "base", "convert",
        "ledger", "report", "mlflow",
    }  # fmt: skip
    assert len(after["train"] - before["train"]) == 2


def test_a_decoder_axis_shares_training_and_overwrites_nothing(tmp_path: Path) -> None:
    decoders = RUN.replace("{kind: ar}}", "{kind: ar}, batch_size: 9}")
    before = keys(Plan(study(tmp_path), tmp_path))
    after = keys(Plan(study(tmp_path, run=decoders), tmp_path))
    assert before["train"] == after["train"]
    assert not before["decode"] & after["decode"]
    assert not before["score"] & after["score"]
    axis = GRID + "axes: {tasks.go.prompts: [1, 2, 3]}"
    assert {k: len(v) for k, v in keys(Plan(study(tmp_path, axis), tmp_path)).items()} == {
        k: len(v) * (3 if k in ("decode", "score") else 1) for k, v in before.items()
    }


def test_files_from_outside_are_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my text").mkdir()
    (tmp_path / "my text" / "a.txt").write_text("one")
    run = RUN.replace("path: text.jsonl", "path: 'my text/*.txt'")
    assert run != RUN

    def inputs() -> list[str]:
        plan = Plan(study(tmp_path, run=run), Path("results"))
        (key,) = keys(plan)["fetch"]
        return plan.inputs("fetch")(SimpleNamespace(key=key))[1:]

    assert inputs() == ["my text/a.txt"]
    (tmp_path / "my text" / "b.txt").write_text("two")
    assert inputs() == ["my text/a.txt", "my text/b.txt"]


def test_config_json_is_written_once_and_auto_stays_resolved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abf.instance.resolve_precision", lambda _: ("bf16", "first machine"))
    results = tmp_path / "results"
    plan = Plan(study(tmp_path), results)
    trained = [i for i in plan.instances.values() if i.stage in ("base", "train")]
    assert plan.write() == len(plan.instances) + len(trained) + 1
    monkeypatch.setattr("abf.instance.resolve_precision", lambda _: ("fp32", "another machine"))
    assert Plan(study(tmp_path), results).write() == 0
    path = plan.cells[0].train.directory(results) / "config.json"
    document = json.loads(path.read_text())
    assert document["config"]["train"]["precision"] == "bf16"
    assert document["resolved"]["train.precision"]["because"] == "first machine"


def test_precision_is_that_of_the_nodes_that_jobs_go_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login node without bf16 instructions must not make GPUs compute in fp32."""
    monkeypatch.setattr("abf.hardware.bf16_instructions", lambda: None)
    (tmp_path / "site.yaml").write_text("account: A\nnode: {gpus: 4}\n")
    monkeypatch.setenv("ABF_SITE", str(tmp_path / "site.yaml"))
    found = {}
    for submit in ("", "--submit"):
        monkeypatch.setenv("ABF_SUBMIT", submit)
        plan = Plan(study(tmp_path), tmp_path / f"results{submit}")
        plan.write()
        path = plan.cells[0].train.directory(plan.results) / "config.json"
        found[submit] = json.loads(path.read_text())["config"]["train"]["precision"]
    assert found == {"": "fp32", "--submit": "bf16"}


def test_axes_exclude_and_names(tmp_path: Path) -> None:
    grid = GRID + "axes: {train.optim.lr: [0.1, 0.2]}\nexclude: [{arm: fixed, train.optim.lr: 0.1}]"
    names = [cell.name for cell in study(tmp_path, grid).cells]
    assert names == [
        "fixed.lr=0.2-s0", "fixed.lr=0.2-s1", "sentence.lr=0.1-s0", "sentence.lr=0.1-s1",
        "sentence.lr=0.2-s0", "sentence.lr=0.2-s1",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("grid", "parts"),
    [
        (GRID.replace("like:", "lik:"), ["arm 'fixed'", "segmenter.lik", "'like'"]),
        (GRID.replace("kind: sentence}", "kind: sentenc}"), ["segmenter.like.kind", "sentenc"]),
        (GRID + "axis: {}", ["grid.yaml", "axis", "'axes'"]),
        (GRID + "exclude: [{lr: 1}]", ["exclude", "lr is no axis", "arm"]),
        (GRID + "axes: {study.x: [1]}", ["study.x", "study holds no keys", "'base'"]),
        (GRID.replace("run.yaml", "other.yaml"), ["other.yaml does not exist"]),
        (GRID.replace("[0, 1]", "[0, 0]"), ["named twice", "fixed-s0"]),
        (GRID + "exclude: [{arm: fixed}, {arm: sentence}]", ["leaves no cell"]),
    ],
)
def test_faults_in_a_grid_name_the_arm_and_the_key(
    tmp_path: Path, grid: str, parts: list[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        study(tmp_path, grid)
    for part in parts:
        assert part in str(caught.value)


def test_an_unplanned_directory_is_refused(tmp_path: Path) -> None:
    plan = Plan(study(tmp_path), tmp_path)
    with pytest.raises(ConfigError, match="plans no train/nothing"):
        plan.find("train", "nothing")


def test_planning_imports_nothing_heavy() -> None:
    """The Snakefile's imports: a login node must not wait for torch or mlflow."""
    code = (
        "import sys, abf.driver, abf.grid, abf.plan, abf.stages;"
        "print([m for m in ('torch', 'mlflow', 'transformers', 'datasets', 'numpy', 'pyarrow')"
        " if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert found.stdout.strip() == "[]", found.stderr
