"""A grid says what its cells are: names come from arms and axes, and nothing it says is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from abf.errors import ConfigError
from abf.grid import Cell, load_study

GRID = "study: grid\nbase: run.yaml\n"


def cells(folder: Path, grid: str) -> list[Cell]:
    (folder / "run.yaml").write_text("study: base\nseed: 7\n")
    (folder / "grid.yaml").write_text(GRID + grid)
    return list(load_study(folder / "grid.yaml").cells)


def refused(folder: Path, grid: str) -> str:
    with pytest.raises(ConfigError) as caught:
        cells(folder, grid)
    return str(caught.value)


@pytest.mark.parametrize(
    ("grid", "parts"),
    [
        ("axes: {seed: [1, 2]}", ["axes.seed", "[1, 2]", "`seeds`"]),
        ("arms: {a: {seed: 1}}", ["arms.a.seed", "value 1", "`seeds`"]),
        ("axes: {arm: [x]}", ["axes.arm", "['x']", "`arms`"]),
        ("arms: {a: {study: x}}", ["arms.a.study", "'x'", "`study`"]),
    ],
)
def test_what_the_grid_sets_itself_is_no_axis(tmp_path: Path, grid: str, parts: list[str]) -> None:
    message = refused(tmp_path, grid)
    for part in ["grid.yaml:3: ", *parts]:
        assert part in message


def test_seeds_are_those_listed(tmp_path: Path) -> None:
    assert [cell.config.seed for cell in cells(tmp_path, "seeds: [1, 3]")] == [1, 3]


@pytest.mark.parametrize(
    ("grid", "parts"),
    [
        (
            "arms: {a: {train.optim.lr: 0.5}}\naxes: {train.optim.lr: [0.1]}",
            ["arm 'a.lr=0.1'", "train.optim.lr (value 0.1) replaces train.optim.lr"],
        ),
        (
            "arms: {a: {train.optim.lr: 0.5}}\naxes: {train.objective: [{kind: ar}], train: [x]}",
            ["train (value 'x') replaces train.optim.lr"],
        ),
        (
            "arms: {a: {pack.row_length: 64, pack: {max_block: 8}}}",
            ["pack (value {'max_block': 8}) replaces pack.row_length"],
        ),
    ],
)
def test_no_value_is_lost_under_another(tmp_path: Path, grid: str, parts: list[str]) -> None:
    message = refused(tmp_path, grid)
    for part in parts:
        assert part in message


def test_a_part_of_what_was_set_before_may_change(tmp_path: Path) -> None:
    (cell,) = cells(tmp_path, "arms: {a: {pack: {row_length: 128}, pack.max_block: 8}}")
    assert (cell.config.pack.row_length, cell.config.pack.max_block) == (128, 8)


def test_axis_values_are_named_as_in_yaml_and_mappings_by_kind(tmp_path: Path) -> None:
    grid = """
axes:
  segmenter: [{kind: sentence}, {kind: fixed, length: 4}]
  train.micro_rows: [null, 2]
  train.objective.loss.shift: [true]
  train.optim.lr: [1e-3]
"""
    # A mapping at train.objective is needed first: the base names none.
    arm = "arms: {a: {train.objective: {kind: block}}}"
    found = cells(tmp_path, arm + grid)
    assert [cell.config.arm for cell in found] == [
        "a.segmenter=sentence.micro_rows=null.shift=true.lr=0.001",
        "a.segmenter=sentence.micro_rows=2.shift=true.lr=0.001",
        "a.segmenter=fixed.micro_rows=null.shift=true.lr=0.001",
        "a.segmenter=fixed.micro_rows=2.shift=true.lr=0.001",
    ]
    assert [cell.config.segmenter.kind for cell in found] == ["sentence"] * 2 + ["fixed"] * 2
    assert [cell.config.train.micro_rows for cell in found] == [None, 2] * 2
    assert {cell.config.train.optim.lr for cell in found} == {0.001}


LONG = "with_a_name_that_says_all_there_is_to_say_about_it"


@pytest.mark.parametrize(
    ("grid", "parts"),
    [
        ("axes: {train.optim.lr: []}", ["axes.train.optim.lr", "at least 1", "value []"]),
        ("axes: {train.optim.lr: 3}", ["axes.train.optim.lr", "value 3"]),
        (
            "axes: {train.optim.lr: [0.1, 0.10]}",
            ["axes.train.optim.lr", "two values are named '0.1'", "list a value once"],
        ),
        (
            "axes: {segmenter: [{kind: fixed, length: 4}, {kind: fixed, length: 8}]}",
            ["axes.segmenter", "named 'fixed'", "`kind`", "arms instead"],
        ),
        ("axes: {pack: [{max_block: 8}]}", ["axes.pack", "{'max_block': 8}", "`kind`", "arms"]),
        ("axes: {sources: [[a]]}", ["axes.sources", "['a']", "small letters", "arms instead"]),
        (
            f"arms: {{{LONG}: {{}}}}\naxes: {{train.objective.loss.length_weight: [0.25],"
            " train.optim.weight_decay: [0.5]}",
            ["86 characters, at most 80", f"{LONG!r} a shorter name", "train.optim.weight_decay"],
        ),
        ("arms: {Big: {}}", ["arms.Big", "a-z"]),
        ("seeds: ['0', '1']", ["seeds[0]", "'0'", "integer"]),
        ("seeds: [-1]", ["seeds[0]", "-1", "greater than or equal to 0"]),
        ("seeds: [0, 0]", ["named twice", "main-s0", "a seed is listed twice"]),
        ("axes: {pack.max_block: [8]}\nexclude: [{pack.max_block: 8}]", ["leaves no cell"]),
    ],
)
def test_faults_say_what_is_wrong_with_the_axis(
    tmp_path: Path, grid: str, parts: list[str]
) -> None:
    message = refused(tmp_path, grid)
    for part in parts:
        assert part in message


@pytest.mark.parametrize(
    ("grid", "place", "said"),
    [
        ("arms:\n  a:\n    train.optim.lrr: 1", "grid.yaml:5", "did you mean 'lr'?"),
        ("arms:\n  a:\n    train.optim: {lr: fast}", "grid.yaml:5", "train.optim.lr: Input"),
        ("arms:\n  a:\n    train.optim:\n      lr: fast", "grid.yaml:6", "train.optim.lr: "),
        ("axes:\n  seed: [1]\n  train.tokens: [10]", "grid.yaml:4", "axes.seed: the grid sets"),
        ("axes:\n  train.micro_rows: [2]\n  train.tokens: [ten]", "grid.yaml:5", "value 'ten'"),
        ("axes:\n  train.tokens: [10, 10]", "grid.yaml:4", "named '10'"),
        ("arms:\n  a: {recipe: recipe.yaml}", "recipe.yaml:3", "train.tokens: Input should be"),
        ("arms:\n  a:\n    recipie: recipe.yaml", "grid.yaml:5", "did you mean 'recipe'?"),
        (
            "arms:\n  a:\n    recipe: nowhere.yaml",
            "grid.yaml:5",
            "does not exist; name it relative",
        ),
        ("arms:\n  a:\n    recipe: [recipe.yaml]", "grid.yaml:5", "write `recipe: FILE.yaml`"),
        ("arms:\n  a: {decoders.ar.sampler.top_p: 2}", "run.yaml:4", "decoders.ar.strategy"),
        ("exclude:\n- {arm: main}\n- {x: 1}", "grid.yaml:5", "x is no axis"),
        ("arms:\n- a", "grid.yaml:3", "arms: must be a mapping"),
        ("seeds: 3", "grid.yaml:3", "seeds: must be a list"),
        ("arm: {a: {}}", "grid.yaml:3", "did you mean 'arms'?"),
    ],
)
def test_a_fault_of_a_cell_is_told_where_it_was_written(
    tmp_path: Path, grid: str, place: str, said: str
) -> None:
    """At the axis, the arm, the recipe or the base, whichever said it."""
    (tmp_path / "recipe.yaml").write_text("train.batch_rows: 4\n\ntrain.tokens: none\n")
    (tmp_path / "run.yaml").write_text("study: x\nseed: 1\ntrain:\n  tokens: 5\n")
    if place.startswith("run"):
        (tmp_path / "run.yaml").write_text("seed: 1\ndecoders:\n  ar:\n    strategy: {kind: arr}\n")
    (tmp_path / "grid.yaml").write_text(GRID + grid)
    with pytest.raises(ConfigError) as caught:
        load_study(tmp_path / "grid.yaml")
    message = str(caught.value)
    assert message.splitlines()[0].startswith(f"{tmp_path / place}: ")
    assert said in message


@pytest.mark.parametrize(
    ("base", "said"),
    [
        ("nowhere.yaml", "does not exist; name it relative"),
        ("grid.yaml", "grid.yaml is a grid itself; name the file of a run"),
    ],
)
def test_a_base_that_is_no_run_is_refused(tmp_path: Path, base: str, said: str) -> None:
    (tmp_path / "grid.yaml").write_text(f"study: x\nbase: {base}\narms: {{a: {{}}}}\n")
    with pytest.raises(ConfigError) as caught:
        load_study(tmp_path / "grid.yaml")
    assert str(caught.value).startswith(f"{tmp_path / 'grid.yaml'}:2: base: ")
    assert said in str(caught.value)
