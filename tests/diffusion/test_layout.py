"""Positions, blocks and read-outs against loops over tokens."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from abf.data.loader import PackedBatch
from abf.diffusion.layout import (
    block_lengths,
    block_starts,
    length_reads,
    mask_reads,
    next_token_reads,
    positions,
    predicted,
    two_stream,
)
from tests.diffusion.rows import V, make_batch, noise

L = 24
pieces = st.lists(st.integers(1, 5), min_size=0, max_size=4)
rows = st.lists(st.lists(pieces, max_size=4), min_size=1, max_size=3)


def fit(drawn: list[list[list[int]]]) -> PackedBatch:
    """As many drawn pieces a row as fit."""
    kept: list[list[list[int]]] = []
    for row in drawn:
        kept.append([])
        for lengths in row:
            if sum(1 + sum(piece) for piece in [*kept[-1], lengths]) <= L:
                kept[-1].append(lengths)
    return make_batch(kept, L)


@given(rows)
@settings(max_examples=60, deadline=None)
def test_positions_and_blocks_equal_a_walk_along_the_row(drawn):
    batch = fit(drawn)
    place, charged = positions(batch.document_id), predicted(batch)
    starts, lengths = block_starts(batch), block_lengths(batch)
    for b in range(len(batch.token_ids)):
        for j in range(L):
            document, block = batch.document_id[b, j], batch.block_id[b, j]
            before = (batch.document_id[b, :j] == document).sum() if document >= 0 else 0
            assert place[b, j] == before
            assert charged[b, j] == (document >= 0 and before > 0)
            first = j == 0 or batch.block_id[b, j - 1] != block
            assert starts[b, j] == (charged[b, j] and first)
            assert lengths[b, j] == (batch.block_id[b] == block).sum()


@pytest.mark.parametrize("shift", [True, False])
@given(drawn=rows)
@settings(max_examples=60, deadline=None)
def test_every_masked_slot_is_read_once_from_the_right_row(shift, drawn):
    batch = fit(drawn)
    noised = noise(batch)
    streams = two_stream(batch, noised, clean_stream="context_causal")
    reads = mask_reads(batch, noised, shift=shift)
    expected = []
    for b, j in zip(*np.nonzero(noised.masked), strict=True):
        first = batch.block_id[b, j - 1] != batch.block_id[b, j]
        row = (L + j - 1 if first else j - 1) if shift else j
        expected.append((b * 2 * L + row, batch.token_ids[b, j], b * L + j))
    found = zip(reads.readout.tolist(), reads.target.tolist(), reads.slot.tolist(), strict=True)
    assert list(found) == expected
    assert (streams.ids[:, L:].numpy() == batch.token_ids).all()
    assert ((streams.ids[:, :L].numpy() == V) == noised.masked).all()
    # A document token in front of a piece is context: never masked, never predicted.
    assert not noised.masked[positions(batch.document_id) == 0].any()


@given(rows)
@settings(max_examples=60, deadline=None)
def test_clean_rows_predict_the_next_token_and_the_next_block(drawn):
    batch = fit(drawn)
    one, two = next_token_reads(batch, noisy=0), next_token_reads(batch, noisy=L)
    flat_row, flat_slot = one.readout.numpy(), one.slot.numpy()
    assert (flat_row == flat_slot - 1).all()
    assert (batch.document_id.ravel()[flat_row] == batch.document_id.ravel()[flat_slot]).all()
    assert (one.target.numpy() == batch.token_ids.ravel()[flat_slot]).all()
    row, column = np.divmod(flat_row, L)
    assert (two.readout.numpy() == row * 2 * L + L + column).all()
    assert len(flat_slot) == predicted(batch).sum()

    lengths = length_reads(batch, noisy=L)
    for row, target, slot in zip(lengths.readout, lengths.target, lengths.slot, strict=True):
        b, j = divmod(int(slot), L)
        assert int(row) == b * 2 * L + L + j - 1
        assert int(target) == (batch.block_id[b] == batch.block_id[b, j]).sum()
    assert len(lengths.slot) == block_starts(batch).sum()
