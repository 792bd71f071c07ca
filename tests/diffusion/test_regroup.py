"""Blocks of another granularity: caps nest, joins fit, nothing crosses a document."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from abf.data.loader import PackedBatch
from abf.diffusion.config import PathCorruption
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.layout import block_starts, predicted
from abf.diffusion.regroup import regroup
from tests.diffusion.rows import V, make_batch, take

BATCH = make_batch([[[5, 9, 2, 16], [7, 3]], [[1, 1, 1, 4], [12, 6, 2]]], 48)
EPOCHS = np.zeros(2, dtype=np.int64)


def lengths(batch: PackedBatch) -> list[list[list[int]]]:
    """Block lengths of each piece, its opening token first."""
    found = []
    for ids, pieces in zip(batch.block_id, batch.document_id, strict=True):
        row = [
            np.unique(ids[pieces == piece], return_counts=True)[1].tolist()
            for piece in np.unique(pieces[pieces >= 0])
        ]
        found.append(row)
    return found


def again(
    batch: PackedBatch = BATCH, *, cap: int | None = None, join: float = 0.0, seed: int = 0
) -> PackedBatch:
    epochs = EPOCHS[: len(batch.token_ids)]
    return regroup(batch, cap=cap, join=join, longest=16, seed=seed, epochs=epochs)


def test_a_cap_cuts_at_multiples_from_a_blocks_start() -> None:
    assert lengths(again(cap=4)) == [
        [[1, 4, 1, 4, 4, 1, 2, 4, 4, 4, 4], [1, 4, 3, 3]],
        [[1, 1, 1, 1, 4], [1, 4, 4, 4, 4, 2, 2]],
    ]


def test_caps_nest_and_end_in_the_packed_blocks() -> None:
    starts = [block_starts(again(cap=cap)) for cap in (1, 2, 4, 8, 16)]
    assert (starts[0] == predicted(BATCH)).all()
    for fine, coarse in itertools.pairwise(starts):
        assert (fine | ~coarse).all()
        assert fine.sum() > coarse.sum()
    assert (starts[-1] == block_starts(BATCH)).all()


def test_without_cap_and_join_nothing_changes() -> None:
    assert again() is BATCH


def test_joins_fit_and_stay_inside_a_document() -> None:
    whole = again(join=1.0)
    assert lengths(whole) == [[[1, 16, 16], [1, 10]], [[1, 7], [1, 12, 8]]]
    some = [again(join=0.4, seed=seed) for seed in range(200)]
    joined = [block_starts(BATCH).sum() - block_starts(one).sum() for one in some]
    assert all((block_starts(BATCH) | ~block_starts(one)).all() for one in some)
    assert 0 < np.mean(joined) < block_starts(BATCH).sum() - block_starts(whole).sum()


@pytest.mark.parametrize("join", [0.0, 0.5])
def test_every_row_is_regrouped_by_itself(join: float) -> None:
    one = take(again(cap=8, join=join), [0])
    alone = again(take(BATCH, [0]), cap=8, join=join)
    assert (one.block_id == alone.block_id).all()


def test_regrouped_rows_can_be_noised() -> None:
    batch = again(cap=4, join=0.5)
    noised = build_corruption(PathCorruption(), mask_id=V).apply(batch, seed=0, epochs=EPOCHS)
    assert len(noised.path.row) == block_starts(batch).sum()
