"""Mask metadata: ranges from ids against the predicate they stand for, written out here by itself.

Letters: B batch, L tokens of a row; the two-stream rows are [noisy ; clean], 2L of them.
"""

from __future__ import annotations

import pytest
import torch
from abf_kernels.block_attention.metadata import causal_ranges, two_stream_ranges
from abf_kernels.block_attention.reference import dense_mask
from hypothesis import given, settings
from hypothesis import strategies as st

STREAMS = ("context_causal", "block_causal")


def two_stream_predicate(document_id, block_id, clean_stream, dropped=frozenset(), sinks=0):
    """Bool [2L,2L] of one row, pair by pair, from the sentence in docs: who may see whom.

    Of blocks before its own, a block in `dropped` sees the document's first `sinks` tokens alone.
    """
    length = len(document_id)
    mask = torch.zeros(2 * length, 2 * length, dtype=torch.bool)
    for query in range(2 * length):
        for key in range(2 * length):
            i, j = query % length, key % length
            if document_id[i] < 0 or document_id[i] != document_id[j]:
                continue
            before = block_id[j] < block_id[i]
            is_sink = j - document_id.index(document_id[i]) < sinks
            if before and block_id[i] in dropped and not is_sink:
                continue
            query_is_noisy, key_is_noisy = query < length, key < length
            if query_is_noisy and key_is_noisy:
                mask[query, key] = block_id[i] == block_id[j]
            elif query_is_noisy:
                mask[query, key] = block_id[j] < block_id[i]
            elif not key_is_noisy:
                seen = j <= i if clean_stream == "context_causal" else block_id[j] <= block_id[i]
                mask[query, key] = seen
    return mask


@st.composite
def packed_ids(draw):
    """Document and block ids of one packed row, with padding around and between documents."""
    documents, blocks = [], []
    document, block = draw(st.integers(0, 3)), draw(st.integers(0, 3))
    for lengths in draw(st.lists(st.lists(st.integers(1, 5), min_size=1, max_size=4), max_size=4)):
        for _ in range(draw(st.integers(0, 2))):
            documents.append(-1)
            blocks.append(draw(st.sampled_from([-1, 0, 99])))
        for length in lengths:
            documents += [document] * length
            blocks += [block] * length
            block += draw(st.integers(1, 3))
        document += draw(st.integers(1, 3))
    documents += [-1] * draw(st.integers(0 if documents else 1, 3))
    blocks += [-1] * (len(documents) - len(blocks))
    return documents, blocks


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("clean_stream", STREAMS)
@settings(max_examples=40, deadline=None)
@given(ids=packed_ids())
def test_two_stream_ranges_are_the_predicate(clean_stream, dtype, ids):
    document_id, block_id = (torch.tensor([row], dtype=dtype) for row in ids)
    ranges = two_stream_ranges(document_id, block_id, clean_stream=clean_stream)
    assert ranges.dtype == torch.int32
    assert ranges.shape == (1, 2 * len(ids[0]), 4)
    expected = two_stream_predicate(ids[0], ids[1], clean_stream)
    assert torch.equal(dense_mask(ranges, 2 * len(ids[0]))[0], expected)


@pytest.mark.parametrize("clean_stream", STREAMS)
@settings(max_examples=60, deadline=None)
@given(ids=packed_ids(), sinks=st.integers(0, 7), data=st.data())
def test_a_dropped_block_sees_the_sinks_and_itself(clean_stream, ids, sinks, data):
    document_id, block_id = ids
    dropped = data.draw(st.sets(st.sampled_from(block_id)))
    ranges = two_stream_ranges(
        torch.tensor([document_id]),
        torch.tensor([block_id]),
        clean_stream=clean_stream,
        dropped=torch.tensor([[block in dropped for block in block_id]]),
        sinks=sinks,
    )
    expected = two_stream_predicate(document_id, block_id, clean_stream, dropped, sinks)
    # Summing what both ranges see would tell a key that is seen twice.
    assert torch.equal(dense_mask(ranges, 2 * len(block_id))[0], expected)
    a0, a1, b0, b1 = ranges[0].unbind(-1)
    assert torch.equal(a1 - a0 + b1 - b0, expected.sum(-1).to(torch.int32))


def test_noisy_blocks_of_other_lengths_are_dropped_with_their_clean_ones():
    document_id = torch.zeros(1, 7, dtype=torch.int64)
    block_id = torch.tensor([[0, 1, 1, 1, 2, 2, 2]])
    # Three slots of the block that begins at 1, one of that at 4, one of padding.
    start = torch.tensor([[1, 1, 1, 4, -1]])
    ranges = two_stream_ranges(
        document_id,
        block_id,
        clean_stream="context_causal",
        block_start=start,
        dropped=block_id == 2,
        sinks=2,
    )
    clean = 5
    assert ranges[0, :5].tolist() == [
        [clean, clean + 1, 0, 3],
        [clean, clean + 1, 0, 3],
        [clean, clean + 1, 0, 3],
        [clean, clean + 2, 3, 4],
        [0, 0, 0, 0],
    ]
    assert ranges[0, 5 + 6].tolist() == [clean, clean + 2, clean + 4, clean + 7]


@pytest.mark.parametrize(
    ("dropped", "sinks", "message"),
    [
        ([[0, 0, 1]], 0, "dropped must be bool of document_id's shape"),
        ([[False, True]], 0, "dropped must be bool of document_id's shape"),
        ([[False, False, True]], 0, "dropped must be one value a block.*row 0, token 2"),
        ([[False, True, True]], -1, "sinks must be 0 or more; got -1"),
    ],
)
def test_what_cannot_be_dropped_is_refused(dropped, sinks, message):
    document_id, block_id = torch.zeros(1, 3, dtype=torch.int64), torch.tensor([[0, 1, 1]])
    with pytest.raises(ValueError, match=message):
        two_stream_ranges(
            document_id,
            block_id,
            clean_stream="context_causal",
            dropped=torch.tensor(dropped),
            sinks=sinks,
        )


@pytest.mark.parametrize("block_size", [1, 3, 4, 12])
def test_block_causal_fixed_size_is_the_mask_of_bd3_lm(block_size):
    length = 12
    block_id = (torch.arange(length) // block_size)[None]
    ranges = two_stream_ranges(torch.zeros_like(block_id), block_id, clean_stream="block_causal")
    block = torch.cat((block_id[0], block_id[0]))
    is_clean = torch.arange(2 * length) >= length
    q_block, k_block, q_clean, k_clean = block[:, None], block, is_clean[:, None], is_clean
    block_diagonal = (q_block == k_block) & (q_clean == k_clean)
    offset_block_causal = (q_block > k_block) & k_clean & ~q_clean
    block_causal = (q_block >= k_block) & k_clean & q_clean
    expected = block_diagonal | offset_block_causal | block_causal
    assert torch.equal(dense_mask(ranges, 2 * length)[0], expected)


def test_clean_stream_of_blocks_of_one_is_causal():
    block_id = torch.arange(9)[None]
    for clean_stream in STREAMS:
        ranges = two_stream_ranges(torch.zeros_like(block_id), block_id, clean_stream=clean_stream)
        clean = dense_mask(ranges, 18)[0, 9:, 9:]
        assert torch.equal(clean, torch.ones(9, 9, dtype=torch.bool).tril())


def test_rows_of_a_batch_do_not_mix():
    document_id = torch.tensor([[0, 0, 1, 1, 2], [0, 0, 0, 0, -1]])
    block_id = torch.tensor([[0, 1, 2, 2, 3], [4, 4, 4, 5, -1]])
    both = two_stream_ranges(document_id, block_id, clean_stream="context_causal")
    for row in range(2):
        alone = two_stream_ranges(
            document_id[row : row + 1], block_id[row : row + 1], clean_stream="context_causal"
        )
        assert torch.equal(both[row : row + 1], alone)


@settings(max_examples=40, deadline=None)
@given(ids=packed_ids())
def test_causal_ranges_are_causal_within_documents(ids):
    document_id = torch.tensor([ids[0]])
    mask = dense_mask(causal_ranges(document_id), len(ids[0]))[0]
    for i, document in enumerate(ids[0]):
        for j, other in enumerate(ids[0]):
            assert mask[i, j] == (document >= 0 and document == other and j <= i)


@pytest.mark.parametrize(
    ("document_id", "block_id", "message"),
    [
        ([0, 1, 0], [0, 1, 2], "document_id must not decrease"),
        ([1, -1, 0], [0, 0, 1], "document_id must not decrease"),
        ([0, -1, 0], [0, 0, 1], "document_id must not have padding"),
        ([0, 0, 0], [0, 2, 1], "block_id must not decrease"),
        ([0, -1, 1], [3, 9, 2], "block_id must not decrease"),
        ([0, 0, 1], [0, 1, 1], "block_id must differ between documents"),
        ([0, -1, 1], [3, 9, 3], "block_id must differ between documents"),
        ([0, 0, 0], [0, 1], "block_id must have document_id's shape"),
        ([], [], r"document_id must have shape"),
        ([0.0, 0.0], [0, 1], "document_id must be int32 or int64"),
        ([0, 0], [0.0, 1.0], "block_id must be int32 or int64"),
    ],
)
def test_bad_ids_are_refused_by_name(document_id, block_id, message):
    with pytest.raises(ValueError, match=message):
        two_stream_ranges(
            torch.tensor([document_id]), torch.tensor([block_id]), clean_stream="context_causal"
        )
    if message.startswith("document_id"):
        with pytest.raises(ValueError, match=message):
            causal_ranges(torch.tensor([document_id]))


def test_unknown_clean_stream_lists_the_allowed():
    ids = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"clean_stream must be one of .*block_causal.*'causal'"):
        two_stream_ranges(ids, ids, clean_stream="causal")  # pyright: ignore[reportArgumentType]
