"""Every recipe is a run of the one trainer, says whether it trains the bound, and learns."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest

from abf.diffusion.layout import block_lengths, predicted
from abf.errors import ConfigError
from abf.grid import load_study
from abf.model.store import with_edit_heads
from abf.train.config import BlockObjective
from abf.train.step import Trainer
from tests.train.tiny_run import new_model, tiny_config, write_rows

CONFIG = Path(__file__).parents[2] / "config"
RECIPES = {path.stem for path in (CONFIG / "recipes").glob("*.yaml")}
BOUND = {"sdar", "nbdiff", "abf", "llada2"}
"""Recipes whose weighted loss is an unbiased draw of the bound they report."""


def objectives() -> dict[str, BlockObjective]:
    cells = load_study(CONFIG / "grids" / "recipes.yaml").cells
    found = {cell.config.arm: cell.config.train.objective for cell in cells}
    return {
        arm: objective
        for arm, objective in found.items()
        if arm in RECIPES and objective.kind == "block"
    }


def test_the_grid_runs_every_recipe_beside_an_ar_arm() -> None:
    cells = load_study(CONFIG / "grids" / "recipes.yaml").cells
    assert {cell.config.arm for cell in cells} == RECIPES | {"ar", "masks"}
    assert len({cell.config.seed for cell in cells}) >= 3
    assert objectives().keys() == RECIPES
    # The same text, base and clean tokens, or it would be no comparison.
    same = {
        (str(cell.config.sources), str(cell.config.base), cell.config.train.tokens)
        for cell in cells
    }
    assert len(same) == 1


def test_recipes_say_what_is_no_bound() -> None:
    flags = {}
    for arm, objective in objectives().items():
        flags[arm] = objective.bound
        text = (CONFIG / "recipes" / f"{arm}.yaml").read_text()
        assert ("NOT a bound" in " ".join(text.replace("#", "").split())) == (not flags[arm])
    assert {arm for arm, flag in flags.items() if flag} == BOUND


def test_the_demo_has_an_arm_with_every_operation() -> None:
    """Trained with all of them, decoded with all of them, beside the same model filling masks."""
    cells = load_study(CONFIG / "grids" / "demo.yaml").cells
    cell = next(cell.config for cell in cells if cell.config.arm == "abf")
    assert cell.train.objective == objectives()["abf"]
    operations = {
        name: set(decoder.strategy.operations)
        for name, decoder in cell.decoders.items()
        if decoder.strategy.kind == "abf"
    }
    assert {"fill"} in operations.values()
    assert {"fill", "insert", "delete", "substitute"} in operations.values()


CAUSAL, BLOCK = "context_causal", "block_causal"
PUBLISHED: dict[str, tuple[object, ...]] = {
    # longest blocks stage by stage, shift, clean stream, weight of the AR loss
    "bd3lm": ([16], False, BLOCK, 0),
    "sdar": ([4], False, BLOCK, 0),
    "fast_dllm_v2": ([32], True, BLOCK, 0),
    "nbdiff": ([1, 2, 4, 8, 16, 32], True, CAUSAL, 0.5),
    "bard": ([4, 8, 16, 32], False, BLOCK, 0),
    "llada2": ([1, 4, 32, 64, 32], False, BLOCK, 0),  # theirs go on to 4096 before they decay
}
"""From the papers and repositories (each recipe names its own), not from the recipes."""


@pytest.mark.parametrize("arm", PUBLISHED)
def test_blocks_and_streams_are_those_of_the_paper(arm: str) -> None:
    (cell,) = (
        c.config
        for c in load_study(CONFIG / "grids" / "recipes.yaml").cells
        if (c.config.arm, c.config.seed) == (arm, 0)
    )
    objective, segmenter = cell.train.objective, cell.segmenter
    assert objective.kind == "block"
    assert segmenter.kind == "fixed"
    steps = 240
    stages = [objective.stage(step, steps).block_cap or segmenter.length for step in range(steps)]
    longest = [b for a, b in zip([None, *stages], stages, strict=False) if a != b]
    loss = objective.loss
    assert (longest, loss.shift, loss.clean_stream, loss.ar_weight) == PUBLISHED[arm]
    assert (getattr(objective.corruption, "pair", False)) == (arm == "fast_dllm_v2")


def test_the_teacher_reads_its_own_smaller_blocks(tmp_path: Path) -> None:
    """BARD: one that learned blocks of 4 teaches blocks of 8."""
    cfg = tiny_config(objective=objectives()["bard"], tokens=16 * 4 * 48)
    trainer = Trainer(cfg, seed=0, model=new_model(), packed=write_rows(tmp_path))
    trainer.losses.teacher.append(copy.deepcopy(trainer.model))
    first, last = trainer.teaching, trainer.steps - 1
    assert first is not None
    rows, epochs = trainer.row_indices(last)
    packed = trainer.rows.rows(rows)
    own, taught = trainer._grouped(last, packed, epochs), trainer._taught(last, packed, epochs)
    assert taught is not None
    assert block_lengths(own)[predicted(own)].max() > 4
    assert block_lengths(taught)[predicted(taught)].max() == 4
    assert trainer._taught(first - 1, packed, epochs) is None


@pytest.mark.parametrize("arm", sorted(RECIPES))
def test_a_recipe_trains_through_all_its_stages(tmp_path: Path, arm: str) -> None:
    objective = objectives()[arm]
    model = new_model()
    if objective.edits:
        model = with_edit_heads(model)
    cfg = tiny_config(objective=objective, tokens=16 * 4 * 48, optim={"lr": 0.01})
    trainer = Trainer(cfg, seed=0, model=model, packed=write_rows(tmp_path))
    losses = []
    for number in range(trainer.steps):
        if number == trainer.teaching:
            trainer.losses.teacher.append(copy.deepcopy(model))
        losses.append(trainer.step(number).sums["nelbo"])
    assert trainer.steps >= 16
    assert all(0 < loss < 1e5 for loss in losses)


def test_a_recipe_comes_before_what_the_arm_says(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("study: base\n")
    (tmp_path / "recipe.yaml").write_text("train.tokens: 5000\ntrain.batch_rows: 4\n")
    grid = tmp_path / "grid.yaml"
    grid.write_text(
        "study: grid\nbase: run.yaml\n"
        "arms: {a: {recipe: recipe.yaml, train.batch_rows: 6}, b: {train.tokens: 7000}}\n"
    )
    a, b = (cell.config.train for cell in load_study(grid).cells)
    assert (a.tokens, a.batch_rows, b.tokens) == (5000, 6, 7000)
    grid.write_text("study: grid\nbase: run.yaml\narms: {a: {recipe: nothing.yaml}}\n")
    with pytest.raises(ConfigError, match=r"nothing\.yaml"):
        load_study(grid)
