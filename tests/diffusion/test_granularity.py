"""Granularity: drawn for a document whatever its text, told to noisy slots and the length head."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError

from abf.data.loader import PackedBatch
from abf.diffusion.config import GranularityConfig, LossConfig, PathCorruption
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.layout import block_lengths, block_starts, predicted, two_stream
from abf.diffusion.loss import ar_charges, block_charges, scatter
from abf.diffusion.regroup import regroup
from abf.model.huggingface import save_hf
from abf.model.store import (
    load_model,
    load_weights,
    save_model,
    with_edit_heads,
    with_granularities,
)
from abf.model.transformer import Transformer
from tests.diffusion.rows import DOCUMENT, V, make_batch, noise, take, tiny_model

LENGTHS = (2, 6)
CONFIG = GranularityConfig(lengths=LENGTHS)
TERMS = ("nelbo", "ar", "length")
L = 60
BATCH = make_batch([[[2] * 14, [1, 2, 3] * 4], [[2, 2, 1, 1] * 4, [2, 3, 1, 2]]], L)


def again(
    batch: PackedBatch = BATCH, cfg: GranularityConfig = CONFIG, *, seed: int = 0, epoch: int = 0
) -> PackedBatch:
    epochs = np.full(len(batch.token_ids), epoch)
    return regroup(
        batch, cap=None, join=0.0, longest=40, seed=seed, epochs=epochs, granularity=cfg,
        known=LENGTHS,
    )  # fmt: skip


def pieces(batch: PackedBatch) -> dict[int, tuple[NDArray[np.int64], int]]:
    """Block lengths of every piece, and what it is told."""
    assert batch.granularity is not None
    found = {}
    starts, size = block_starts(batch), block_lengths(batch)
    for number in np.unique(batch.document_id[batch.document_id >= 0]):
        inside = batch.document_id == number
        (told,) = np.unique(batch.granularity[inside])
        found[int(number)] = size[inside & starts], int(told)
    assert (batch.granularity[batch.document_id < 0] == -1).all()
    return found


def told_model(model: Transformer | None = None) -> Transformer:
    """A model on which it makes a difference what it is told."""
    made = with_granularities(tiny_model() if model is None else model, LENGTHS).double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        made.granularity_input.normal_(0, 1, generator=generator)
        made.granularity_length.normal_(0, 1, generator=generator)
    return made


def test_blocks_are_as_long_on_average_as_was_drawn() -> None:
    """Blocks of 2, T = 6: each starts anew with probability 1/3, whatever was before it."""
    batch = make_batch([[[2] * 400]], 801)
    sizes: dict[int, list[NDArray[np.int64]]] = {0: [], 1: []}
    whole = GranularityConfig(lengths=LENGTHS, told=1)
    for seed in range(60):
        (lengths, told), = pieces(again(batch, whole, seed=seed)).values()  # fmt: skip
        sizes[told].append(lengths)
    assert (np.concatenate(sizes[0]) == 2).all()
    joined = np.concatenate(sizes[1])
    assert joined.mean() == pytest.approx(6, abs=0.15)
    share = np.bincount(joined // 2, minlength=6)[1:6] / len(joined)
    np.testing.assert_allclose(share, [1 / 3 * (2 / 3) ** k for k in range(5)], atol=0.02)
    assert 15 < len(sizes[0]) < 45, "each is drawn as often"


def test_blocks_that_are_longer_stay_and_nothing_else_changes() -> None:
    batch = make_batch([[[7, 8, 5]]], 24)
    for seed in range(20):
        (lengths, _), = pieces(again(batch, seed=seed)).values()  # fmt: skip
        assert lengths.tolist() == [7, 8, 5]
    one = again()
    for name in ("token_ids", "document_id", "row"):
        assert (getattr(one, name) == getattr(BATCH, name)).all()
    assert (block_starts(BATCH) | ~block_starts(one)).all()
    assert (predicted(one) == predicted(BATCH)).all()


def test_it_is_a_function_of_seed_epoch_and_document_alone() -> None:
    """And so of neither the text nor its blocks: what is told gives nothing of them away."""
    whole = pieces(again(seed=4))
    alone = pieces(again(take(BATCH, [1]), seed=4))
    for number, (lengths, told) in alone.items():
        assert told == whole[number][1]
        assert lengths.tolist() == whole[number][0].tolist()
    other = make_batch([[[5, 3, 20], [24]], [[1] * 24, [4, 4]]], L)
    for seed in range(10):
        for epoch in range(2):
            first, second = (pieces(again(b, seed=seed, epoch=epoch)) for b in (BATCH, other))
            assert {n: told for n, (_, told) in first.items()} == {
                n: told for n, (_, told) in second.items()
            }
    draws = [
        [t for _, t in pieces(again(seed=s, epoch=e)).values()] for s in range(8) for e in (0, 1)
    ]
    assert len({tuple(draw) for draw in draws}) > 8


def test_some_documents_are_not_told() -> None:
    half = GranularityConfig(lengths=LENGTHS, told=0.5)
    told = np.array([[t for _, t in pieces(again(cfg=half, seed=s)).values()] for s in range(300)])
    np.testing.assert_allclose(
        [(told == k).mean() for k in (-1, 0, 1)], [0.5, 0.25, 0.25], atol=0.04
    )
    # They are joined all the same.
    lengths = [x for s in range(40) for x, t in pieces(again(cfg=half, seed=s)).values() if t == -1]
    assert np.concatenate(lengths).max() > 3


def test_only_noisy_slots_and_lengths_are_told() -> None:
    batch = again(seed=1)
    assert batch.granularity is not None
    noised = build_corruption(PathCorruption(), mask_id=V).apply(
        batch, seed=0, epochs=np.zeros(2, int)
    )
    streams = two_stream(batch, noised, clean_stream="context_causal")
    assert streams.granularity is not None
    found = streams.granularity.numpy()
    assert (found[:, streams.noisy :] == -1).all()
    for row, start in enumerate(noised.block_start):
        for slot, first in enumerate(start):
            wanted = -1 if first < 0 else batch.granularity[row, first]
            assert found[row, slot] == wanted
    assert two_stream(BATCH, noise(BATCH), clean_stream="context_causal").granularity is None


@pytest.mark.parametrize("kind", ["masked", "path"])
def test_the_ar_view_does_not_hear_it_and_the_block_does(kind: str) -> None:
    """P3 with granularity: the clean stream is the AR model whatever the blocks are told."""
    batch = again(seed=1)
    assert batch.granularity is not None
    model = told_model(with_edit_heads(tiny_model(max_block=40)))
    wanted = scatter(ar_charges(model, BATCH, backend="reference"), BATCH)
    if kind == "masked":
        noised = noise(batch)
    else:
        noised = build_corruption(PathCorruption(), mask_id=V).apply(
            batch, seed=0, epochs=np.zeros(2, dtype=np.int64)
        )
    charges = []
    for told in (-1, 0, 1):
        asked = dataclasses.replace(batch, granularity=np.full_like(batch.granularity, told))
        found = block_charges(
            model, asked, noised, loss=LossConfig(shift=False), backend="reference", terms=TERMS
        )
        np.testing.assert_allclose(scatter(found["ar"], asked), wanted, rtol=0, atol=1e-10)
        charges.append(found)
    for name in ("nelbo", "length"):
        sums = [float(each[name].sum.detach()) for each in charges]
        assert len({round(total, 6) for total in sums}) == 3, name
    # Not to be told is to be an ordinary model.
    plain = dataclasses.replace(batch, granularity=None)
    found = block_charges(
        model, plain, noised, loss=LossConfig(shift=False), backend="reference", terms=TERMS
    )
    assert all(torch.equal(found[name].nll, charges[0][name].nll) for name in TERMS)


def test_what_a_block_is_told_reaches_no_other_document() -> None:
    batch = again(seed=1)
    assert batch.granularity is not None
    model = told_model(tiny_model(max_block=40))
    other = batch.granularity.copy()
    (mine,) = np.unique(batch.document_id[0, :10])
    changed = batch.document_id == mine
    other[changed] = (other[changed] + 2) % 3 - 1
    found, wanted = (
        block_charges(
            model, dataclasses.replace(batch, granularity=g), noise(batch), loss=LossConfig(),
            backend="tiles", terms=("nelbo", "length"),
        )
        for g in (other, batch.granularity)
    )  # fmt: skip
    for name in ("nelbo", "length"):
        differs = scatter(found[name], batch) != scatter(wanted[name], batch)
        assert differs[changed].any()
        assert not differs[~changed].any()


def test_a_model_is_the_same_until_it_has_learnt_what_it_is_told() -> None:
    plain = tiny_model(max_block=40, dtype=torch.float32)
    grown = with_granularities(plain, LENGTHS)
    assert with_granularities(grown, LENGTHS) is grown
    assert with_granularities(plain, ()) is plain
    assert grown.config == plain.config.model_copy(update={"granularities": LENGTHS})
    batch = again(seed=1)
    untold = dataclasses.replace(batch, granularity=None)
    found, wanted = (
        block_charges(m, b, noise(b), loss=LossConfig(), backend="tiles", terms=TERMS)
        for m, b in ((grown, batch), (plain, untold))
    )
    for name in TERMS:
        assert torch.equal(found[name].nll, wanted[name].nll), name
        assert torch.equal(found[name].sum, wanted[name].sum)
    (found["nelbo"].sum + found["length"].sum).backward()
    for table in (grown.granularity_input, grown.granularity_length):
        assert table.grad is not None
        assert table.grad.any(), "and what it is told can be learnt"


def test_it_is_saved_and_exported_without(tmp_path: Path) -> None:
    plain = tiny_model(dtype=torch.float32)
    model = told_model(plain).float()
    save_model(model, tmp_path / "abf")
    read = load_model(tmp_path / "abf")
    assert read.config.granularities == LENGTHS
    for name, value in model.state_dict().items():
        assert torch.equal(read.state_dict()[name], value), name
    save_hf(plain, tmp_path / "plain")
    save_hf(model, tmp_path / "told")
    one, two = (load_weights(tmp_path / name / "model.safetensors") for name in ("plain", "told"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    fresh = Transformer(model.config)
    fresh.initialise(torch.Generator().manual_seed(0))
    assert not fresh.granularity_input.any()
    assert not fresh.granularity_length.any()
    assert fresh.config.document_id == DOCUMENT


def test_lengths_must_grow() -> None:
    with pytest.raises(ValidationError, match=r"lengths must grow, not \[6, 2\]"):
        GranularityConfig(lengths=(6, 2))
