"""What is particular to the Triton back end of block attention, under Triton's interpreter.

Letters: B batch, H query heads, G kv heads, M queries, N keys, D head dim, L tokens of a row.
"""

from __future__ import annotations

import gc
import math
import weakref

import pytest
import torch
from abf_kernels.block_attention import configs, triton_plan
from abf_kernels.block_attention.api import block_attention
from abf_kernels.block_attention.memo import Memo
from abf_kernels.block_attention.metadata import causal_ranges, two_stream_ranges
from abf_kernels.block_attention.triton_plan import DevicePlan

from tests.kernels.dense import LAYOUTS, check, dense_attention, ids_of, visible, with_gradients
from tests.kernels.poison import poison


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory(monkeypatch):
    poison(monkeypatch)


def two_streams(layout, clean_stream="context_causal"):
    document_id, block_id = ids_of(LAYOUTS[layout])
    return two_stream_ranges(document_id, block_id, clean_stream=clean_stream)


@pytest.mark.parametrize(
    ("dim", "layout", "heads"),
    [
        (64, "longer_than_a_tile", (2, 1)),
        (72, "blocks_of_one", (4, 2)),
        (72, "padding", (2, 2)),
        (128, "rows_that_differ", (4, 2)),
    ],
)
def test_float16_with_grouped_heads(dim, layout, heads):
    ranges = two_streams(layout)
    check(ranges, ranges.shape[1], backend="triton", dtype=torch.float16, heads=heads, dim=dim)


def test_streams_of_different_lengths():
    """Noisy blocks of 3, 150 and 9 tokens stand for clean ones of 40, 20 and 30."""
    clean = torch.arange(3).repeat_interleave(torch.tensor([40, 20, 30]))[None]
    start = torch.tensor([0, 40, 60]).repeat_interleave(torch.tensor([3, 150, 9]))[None]
    ranges = two_stream_ranges(
        torch.zeros_like(clean), clean, clean_stream="block_causal", block_start=start
    )
    check(ranges, 162 + 90, backend="triton", heads=(2, 1), dim=64)


@pytest.mark.parametrize("reverse", [False, True])
def test_windows_ragged_at_both_ends(reverse):
    """Both ranges have keys that a whole tile sees, between edges that it does not."""
    i = torch.arange(150)
    a0, a1, b0, b1 = i // 2, 160 + i, 320 + i // 3, 560 - i // 4
    ends = (b0, b1, a0, a1) if reverse else (a0, a1, b0, b1)
    check(torch.stack(ends, -1)[None], 560, backend="triton", heads=(2, 1), dim=64)


@pytest.mark.parametrize("scale", [-5.0, 0.0])
def test_scales_that_are_not_positive(scale):
    """Scores of -5 q·k spread over hundreds: their maximum must be theirs, not that of q·k."""
    ranges = causal_ranges(torch.zeros(1, 200, dtype=torch.int64))
    q, k, v = (torch.randn(1, 1, ranges.shape[1], 64) for _ in range(3))
    found = block_attention(q, k, v, ranges, backend="triton", scale=scale)
    wanted = dense_attention(q, k, v, ranges, scale)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)


def test_what_is_not_written_yet_does_not_reach_the_result():
    """A cache of 100 keys whose requests have written 70 and 3; their blocks come after it."""
    written = torch.tensor([[70], [3]])
    rows = torch.zeros(2, 20, dtype=torch.int64)
    ranges = torch.stack((rows, rows + written, rows + 100, rows + 120), -1)
    q, k, v, grad_out = (torch.randn(2, 2, size, 64) for size in (20, 150, 150, 20))
    unseen = ~visible(ranges, 150).any(1)[:, None, :, None]
    inputs = q, k.masked_fill(unseen, math.nan), v.masked_fill(unseen, math.nan)
    found = with_gradients(
        lambda *x: block_attention(*x, ranges, backend="triton"), inputs, grad_out
    )
    wanted = with_gradients(lambda *x: dense_attention(*x, ranges, 0.125), (q, k, v), grad_out)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", ["reference", "tiles", "triton"])
def test_log_sum_of_what_is_seen(backend):
    ranges = two_streams("padding")
    q = torch.randn(2, 4, ranges.shape[1], 64, requires_grad=True)
    k, v = (torch.randn(2, 2, ranges.shape[1], 64) for _ in range(2))
    out, lse = block_attention(q, k, v, ranges, backend=backend, scale=0.5, return_lse=True)
    scores = 0.5 * q.double() @ k.double().repeat_interleave(2, 1).mT
    scores = scores.masked_fill(~visible(ranges, k.shape[2])[:, None], -math.inf)
    assert lse.dtype == torch.float32
    assert not lse.requires_grad
    assert lse.isinf().any()
    torch.testing.assert_close(lse.double(), scores.logsumexp(-1), rtol=1e-5, atol=1e-5)
    assert torch.equal(out, block_attention(q, k, v, ranges, backend=backend, scale=0.5))


def test_float16_gradients_survive_an_attention_sink():
    """One key takes nearly all the weight, as in a pretrained model's first layers: what rounding
    takes from the output is more than the gradient, unless delta counts it."""
    torch.manual_seed(0)
    ranges = causal_ranges(torch.zeros(1, 128, dtype=torch.long))
    sink = torch.randn(64)
    q, k, v, grad = (torch.randn(1, 1, 128, 64) for _ in range(4))
    q, v = q * 0.3 + sink, torch.cat((v[:, :, :1] * 4, v[:, :, 1:]), dim=2)
    k = torch.cat((sink.expand(1, 1, 1, 64), k[:, :, 1:]), dim=2)
    inputs = [x.half() for x in (q, k, v)]
    found = with_gradients(
        lambda *x: block_attention(*x, ranges, backend="triton"), inputs, grad.half()
    )
    true = with_gradients(
        lambda *x: dense_attention(*x, ranges, 0.125),
        [x.double() for x in inputs],
        grad.half().double(),
    )
    for one, other in zip(found, true, strict=True):
        assert (one - other).norm() < 2e-3 * other.norm()


def test_a_plan_is_made_once_and_anew_when_ranges_are_written_to(monkeypatch):
    made = []
    real = DevicePlan.bounds
    monkeypatch.setattr(
        DevicePlan, "bounds", lambda self, rows: made.append(self) or real(self, rows)
    )
    ranges = causal_ranges(torch.zeros(1, 30, dtype=torch.int64))
    q = torch.randn(1, 1, 30, 64)
    causal = [block_attention(q, q, q, ranges, backend="triton") for _ in range(2)]
    assert made[0] is made[1]
    assert torch.equal(*causal)
    ranges[..., 1] = 30
    found = block_attention(q, q, q, ranges, backend="triton")
    assert made[2] is not made[1]
    torch.testing.assert_close(
        found.double(), dense_attention(q, q, q, ranges, 0.125), rtol=1e-5, atol=1e-5
    )
    ranges[0, 7, 1] = 31
    with pytest.raises(ValueError, match=r"ranges must lie within \[0, 30\].*31"):
        block_attention(q, q, q, ranges, backend="triton")


def test_ranges_written_to_before_the_backward_pass_are_an_error():
    ranges = causal_ranges(torch.zeros(1, 30, dtype=torch.int64))
    q = torch.randn(1, 1, 30, 64, requires_grad=True)
    out = block_attention(q, q, q, ranges, backend="triton")
    ranges[0, 7, 1] = 3
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


def test_a_plan_does_not_keep_its_ranges_alive():
    memo: Memo[DevicePlan] = Memo()

    def planned():
        ranges = causal_ranges(torch.zeros(1, 30, dtype=torch.int64))
        assert ranges.dtype == torch.int32
        memo.get(ranges, 30, lambda: DevicePlan(ranges, 30)).bounds(16)
        return weakref.ref(ranges)

    gone = planned()
    gc.collect()
    assert gone() is None


def test_bounds_are_no_wider_than_what_is_seen():
    """Four extremes of each range; where no key is seen by all, that part is empty at the end."""
    generator = torch.Generator().manual_seed(0)
    cuts = torch.randint(61, (2, 50, 4), generator=generator).sort(-1).values
    cuts[1, :, 0] = cuts[1, :, 1]  # all empty
    cuts[1, :, 2:] = torch.tensor([20, 45])
    cuts[1, 3, 2:] = torch.tensor([0, 0])
    found = DevicePlan(cuts, 60 + 1).bounds(16)
    assert found.shape == (2, 4, 8)
    for batch in range(2):
        for tile in range(4):
            rows = cuts[batch, 16 * tile : 16 * tile + 16]
            for which in range(2):
                start, end = rows[:, 2 * which], rows[:, 2 * which + 1]
                seen = start < end
                hi = int(end[seen].max()) if seen.any() else 0
                lo = int(start[seen].min()) if seen.any() else 0
                whole = int(start.max()), int(end.min())
                whole = whole if whole[0] < whole[1] else (hi, hi)
                assert found[batch, tile, 4 * which : 4 * which + 4].tolist() == [lo, *whole, hi]


@pytest.mark.parametrize(("n_queries", "n_keys"), [(300, 200), (100, 1000)])
def test_many_tiles_are_listed_for_each_tile_of_keys(n_queries, n_keys, monkeypatch):
    """More query tiles than the device looks at together; entries are checked pair by pair."""
    monkeypatch.setattr(triton_plan, "CHUNK", 16)
    generator = torch.Generator().manual_seed(n_queries)
    cuts = torch.randint(n_keys + 1, (2, n_queries, 4), generator=generator).sort(-1).values
    cuts[0] = cuts[0].sort(0).values  # a row in order and one without any
    rows, keys = (4, 64)
    found = DevicePlan(cuts, n_keys).touching(rows, keys)
    assert found.entries.shape[2] == 2 * math.ceil(n_queries / rows)
    for batch in range(2):
        starts, ends = cuts[batch, :, ::2], cuts[batch, :, 1::2]
        for tile in range(math.ceil(n_keys / keys)):
            first, last = tile * keys, min(tile * keys + keys, n_keys)
            sees = ((starts < last) & (ends > first) & (starts < ends)).split(rows)
            sees_all = ((starts <= first) & (ends >= last)).split(rows)
            n_full, n_partial = found.counts[batch, tile].tolist()
            entries = found.entries[batch, tile].tolist()
            full, partial = entries[:n_full], entries[len(entries) - n_partial :]
            for number, (some, whole) in enumerate(zip(sees, sees_all, strict=True)):
                for which in range(2):
                    entry = 2 * number + which
                    assert (entry in full) == bool(whole[:, which].all())
                    if some[:, which].any() and entry not in full:
                        assert entry in partial
            assert len(set(full + partial)) == n_full + n_partial


def test_a_gpu_has_its_own_row_and_others_the_default():
    for dim in (64, 128):
        assert configs.choose((8, 0), dim, 2) is configs.CONFIGS["sm_80", dim, 2]
        assert configs.choose((9, 0), dim, 2) is configs.CONFIGS["sm_90", dim, 2]
        for capability in ((8, 0), (9, 0), (8, 9), (12, 0)):
            assert configs.choose(capability, dim, 4) is configs.CONFIGS["default", dim, 4]
        assert configs.choose((8, 9), dim, 2) is configs.CONFIGS["default", dim, 2]
