"""Block dropout: which blocks lose what lies before them, and that they do in every loss."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError

from abf.data.loader import PackedBatch
from abf.diffusion.config import (
    Corruption,
    HistoryConfig,
    LossConfig,
    MaskedCorruption,
    PathCorruption,
)
from abf.diffusion.corrupt.base import Noised, build_corruption
from abf.diffusion.layout import block_starts, positions, run_starts
from abf.diffusion.loss import block_charges, scatter
from abf.diffusion.regroup import drop_history
from abf.diffusion.terms import Charges
from abf.model.store import with_edit_heads
from abf.train.config import BlockObjective
from abf.train.step import Trainer
from tests.diffusion.rows import V, make_batch, noise, take, tiny_model
from tests.train.tiny_run import new_model, tiny_config, write_rows

L = 26
BATCH = make_batch([[[1, 3, 2, 4], [2, 5]], [[5, 1, 1], [3, 6, 2]]], L)
ALL = HistoryConfig(dropout=1.0, sinks=2)


def forgetful(batch: PackedBatch, cfg: HistoryConfig | None, *, seed: int = 0) -> PackedBatch:
    return drop_history(batch, cfg, seed=seed, epochs=np.zeros(len(batch.token_ids), np.int64))


def test_the_share_is_of_blocks_and_whole_ones_are_drawn() -> None:
    batch = make_batch([[[3, 1, 4, 2] * 60]], 601)
    shares = []
    for seed in range(40):
        dropped = forgetful(batch, HistoryConfig(dropout=0.3), seed=seed).dropped
        assert dropped is not None
        assert (dropped == np.take_along_axis(dropped, run_starts(batch.block_id), axis=1)).all()
        shares.append(dropped[block_starts(batch)].mean())
    # 40 x 240 blocks: a standard error of 0.0047.
    assert np.mean(shares) == pytest.approx(0.3, abs=0.02)


def test_the_draw_does_not_depend_on_the_batch() -> None:
    half = HistoryConfig(dropout=0.5)
    whole = forgetful(BATCH, half).dropped
    parts = [forgetful(take(BATCH, [row]), half).dropped for row in (1, 0)]
    assert whole is not None
    assert parts[0] is not None
    assert parts[1] is not None
    assert (whole == np.concatenate((parts[1], parts[0]))).all()
    assert 0 < whole[BATCH.document_id >= 0].mean() < 1


def test_nobody_forgets_unless_asked() -> None:
    cleared = forgetful(forgetful(BATCH, ALL), None)
    assert cleared.dropped is None
    assert cleared.sinks == 0


@pytest.mark.parametrize("corruption", [MaskedCorruption(), PathCorruption(late=0.4)])
def test_a_dropped_block_is_charged_by_the_sinks_and_itself(corruption: Corruption) -> None:
    """Other text before a block changes its charges if it is seen, and only then."""
    corrupter = build_corruption(corruption, mask_id=V)
    noised = corrupter.apply(BATCH, seed=0, epochs=np.zeros(2, np.int64), draw=0)
    model = with_edit_heads(tiny_model(max_block=8)).double()
    charges = []
    place = positions(BATCH.document_id)
    for changed in (None, "sink", "text"):
        batch = BATCH
        if changed:
            # Token 1 is a sink (the document token is token 0), token 4 none: both have later
            # blocks behind them in every piece of five tokens or more.
            other = np.where(place == (1 if changed == "sink" else 4), 99, BATCH.token_ids)
            batch = dataclasses.replace(BATCH, token_ids=other)
        found = block_charges(
            model, forgetful(batch, ALL), noised, loss=LossConfig(shift=False, ar_weight=0),
            backend="reference", terms=("nelbo",),
        )  # fmt: skip
        charges.append(scatter(found["nelbo"], BATCH))
    begins = np.take_along_axis(place, run_starts(BATCH.block_id), axis=1)
    behind = (begins > 4) & (BATCH.document_id >= 0)
    charged = behind & (charges[0] != 0)
    assert charged.any()
    assert (charges[0][behind] == charges[2][behind]).all()
    assert (charges[0][charged] != charges[1][charged]).all()


def test_without_sinks_a_dropped_block_is_a_document_of_its_own() -> None:
    """Each block goes through the model by itself, in a row and a document that hold nothing else;
    what it is charged there, in both streams, is what it is charged among the others."""
    noised = noise(BATCH)
    model = tiny_model(max_block=8)
    loss = LossConfig(shift=False)

    def charged(batch: PackedBatch, noisy: Noised) -> dict[str, Charges]:
        return block_charges(
            model, batch, noisy, loss=loss, backend="reference", terms=("nelbo", "ar")
        )

    found = charged(forgetful(BATCH, HistoryConfig(dropout=1.0, sinks=0)), noised)
    nelbo, ar = (scatter(found[name], BATCH) for name in ("nelbo", "ar"))
    seen = 0
    for row in range(len(BATCH.token_ids)):
        for block in np.unique(BATCH.block_id[row][BATCH.document_id[row] >= 0]):
            at = np.flatnonzero(BATCH.block_id[row] == block)
            index = row, at
            size = len(at)
            zero = np.zeros((1, size), dtype=np.int64)
            alone = charged(
                PackedBatch(BATCH.token_ids[index][None], zero, zero, np.zeros(1, np.int64)),
                Noised(
                    noised.noisy_ids[index][None],
                    zero,
                    noised.masked[index][None],
                    noised.weight[index][None],
                ),
            )
            own = {name: charges.nll.double().detach().numpy() for name, charges in alone.items()}
            # Charges come in the order of their slots.
            np.testing.assert_allclose(nelbo[index][noised.masked[index]], own["nelbo"], rtol=1e-9)
            # A document charges no first token: in the row, the clean token before it tells that.
            np.testing.assert_allclose(ar[index][1:], own["ar"], rtol=1e-9)
            seen += len(own["nelbo"])
    assert seen == noised.masked.sum() > 10


def test_a_stage_drops_and_the_next_does_not(tmp_path: Path) -> None:
    packed = write_rows(tmp_path)
    objective = BlockObjective.model_validate(
        {"stages": [{"until": 0.5, "history": {"dropout": 1.0}}, {"until": 1.0}]}
    )
    assert not objective.bound
    with_it = Trainer(tiny_config(objective=objective), seed=0, model=new_model(), packed=packed)
    plain = Trainer(
        tiny_config(objective=BlockObjective()), seed=0, model=new_model(), packed=packed
    )
    (dropped, *_), (whole, *_) = with_it.gradients(0), plain.gradients(0)
    assert dropped["nelbo"] != whole["nelbo"]
    last = plain.steps - 1
    assert with_it.gradients(last)[0] == plain.gradients(last)[0]


def test_no_share_is_said_by_leaving_it_out() -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        HistoryConfig(dropout=0)
