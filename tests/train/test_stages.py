"""Stages of a run: pure functions of the step, each trained as it says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from abf.diffusion.corrupt.masked import Masked
from abf.diffusion.layout import block_lengths, predicted
from abf.train.config import BlockObjective
from abf.train.step import Trainer
from tests.train.tiny_run import L, new_model, tiny_config, write_rows

GROWTH = [
    {"until": 0.25, "block_cap": 1},
    {"until": 0.5, "block_cap": 2, "corruption": {"kind": "masked", "weight": "one"}},
    {"until": 1.0, "join": 1.0},
]


def objective(**settings: Any) -> BlockObjective:
    return BlockObjective.model_validate(settings)


def test_a_stage_is_a_function_of_the_step() -> None:
    growth = objective(stages=GROWTH)
    caps = [growth.stage(step, 8).block_cap for step in range(8)]
    assert caps == [1, 1, 2, 2, None, None, None, None]
    assert objective().stage(3, 8).block_cap is None


def test_each_step_trains_its_stage(tmp_path: Path) -> None:
    packed = write_rows(tmp_path)
    cfg = tiny_config(objective=objective(stages=GROWTH), tokens=8 * 4 * L)
    trainer = Trainer(cfg, seed=0, model=new_model(), packed=packed)
    longest, weights = [], []
    for number in range(8):
        rows, epochs = trainer.row_indices(number)
        batch = trainer._grouped(number, trainer.rows.rows(rows), epochs)
        corruption = trainer._corruption(number)
        assert isinstance(corruption, Masked)
        longest.append(int(block_lengths(batch)[predicted(batch)].max()))
        weights.append(corruption.cfg.weight)
    assert longest[:4] == [1, 1, 2, 2]
    assert min(longest[4:]) > 2
    assert weights == ["exact", "exact", "one", "one", *["exact"] * 4]


def test_blocks_of_one_token_are_charged_as_the_ar_model(tmp_path: Path) -> None:
    packed = write_rows(tmp_path)
    cfg = tiny_config(objective=objective(stages=[{"until": 1.0, "block_cap": 1}]))
    trainer = Trainer(cfg, seed=0, model=new_model(), packed=packed)
    sums, counts, _, _ = trainer.gradients(0)
    assert sums["nelbo"] == pytest.approx(sums["ar"], rel=1e-5)
    assert counts["length"] == counts["nelbo"]


def test_both_views_of_a_pair_are_trained(tmp_path: Path) -> None:
    packed = write_rows(tmp_path)
    pair = {"kind": "masked", "weight": "one", "pair": True}
    one = Trainer(tiny_config(objective=objective()), seed=0, model=new_model(), packed=packed)
    both = Trainer(
        tiny_config(objective=objective(corruption=pair)), seed=0, model=new_model(), packed=packed
    )
    (alone, counts, _, _), (sums, twice, masked, _) = one.gradients(0), both.gradients(0)
    assert masked == counts["nelbo"] == twice["nelbo"]
    assert sums["ar"] == pytest.approx(alone["ar"])
    assert np.isfinite(sums["nelbo"])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stages": [{"until": 0.5}]}, "the last at 1"),
        ({"stages": [{"until": 0.5}, {"until": 0.5}, {"until": 1}]}, "one after another"),
        ({"stages": [{"until": 1, "corruption": {"kind": "path"}}]}, "mix corruptions"),
        ({"corruption": {"kind": "path", "drafts": {}}}, "teach nothing"),
        ({"loss": {"edit_weight": 1}}, "nothing drafts"),
        (
            {"stages": [{"until": 1, "join": 0.2, "granularity": {"lengths": [4]}}]},
            "join=0.2 and granularity both say",
        ),
    ],
)
def test_what_cannot_be_trained_is_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        objective(**settings)
