"""Block attention: the back ends against a float64 dense computation in `dense.py`.

Letters: B batch, H query heads, G kv heads, M queries, N keys, D head dim, L tokens of a row.
"""

from __future__ import annotations

import pytest
import torch
from abf_kernels.block_attention import configs, plan, tiles
from abf_kernels.block_attention.api import block_attention
from abf_kernels.block_attention.metadata import causal_ranges, two_stream_ranges
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from tests.kernels.dense import (
    LAYOUTS,
    TOLERANCE,
    any_ranges,
    check,
    dense_attention,
    ids_of,
    visible,
)
from tests.kernels.poison import poison

SHARED_FIXTURE = [HealthCheck.function_scoped_fixture]  # it holds for every example alike


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory(monkeypatch):
    poison(monkeypatch)


@pytest.fixture(autouse=True)
def one_thread():
    """On a shared machine a second thread mostly waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "tiles", "small tiles", "triton"])
def backend(request, monkeypatch):
    """Each back end, with constants that cut these small inputs into many tiles; `tiles` also as
    it is."""
    if request.param == "triton":
        sizes = configs.Tile(32, 64, 4, 1), configs.Tile(64, 32, 4, 1), configs.Tile(32, 64, 4, 1)
        monkeypatch.setattr(configs, "INTERPRETED", configs.Config(*sizes))
    if request.param == "small tiles":
        monkeypatch.setattr(tiles, "ROWS", 16)
        monkeypatch.setattr(tiles, "SCRATCH", 1000)
        monkeypatch.setattr(plan, "COLUMNS", 8)
    return request.param.removeprefix("small ")


def widest(backend):
    """The most exact type that a back end computes in."""
    return torch.float32 if backend == "triton" else torch.float64


@pytest.mark.parametrize("clean_stream", ["context_causal", "block_causal"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_stream_layouts(layout, clean_stream, backend):
    document_id, block_id = ids_of(LAYOUTS[layout])
    ranges = two_stream_ranges(document_id, block_id, clean_stream=clean_stream)
    check(ranges, 2 * document_id.shape[1], backend=backend, heads=(1, 1))


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(6, 2), (4, 1)])  # as many of both: all other tests
def test_dtypes_and_grouped_heads(heads, dtype, backend):
    document_id, block_id = ids_of(LAYOUTS["padding"])
    ranges = two_stream_ranges(document_id, block_id, clean_stream="context_causal")
    if backend == "triton" and dtype in (torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=f"q must be .*; got {dtype}"):
            check(ranges, 2 * document_id.shape[1], backend=backend, dtype=dtype, heads=heads)
        return
    check(ranges, 2 * document_id.shape[1], backend=backend, dtype=dtype, heads=heads)


def test_causal_rows_with_int64_ranges_and_scale(backend):
    document_id, _ = ids_of(LAYOUTS["several_documents"])
    ranges = causal_ranges(document_id).long()
    check(ranges, document_id.shape[1], backend=backend, scale=0.7, dim=5)


@settings(max_examples=30, deadline=None, suppress_health_check=SHARED_FIXTURE)
@given(drawn=any_ranges(), seed=st.integers(0, 2**32 - 1))
def test_any_ranges_whatever_their_order(backend, drawn, seed):
    ranges, n_keys = drawn
    check(ranges, n_keys, backend=backend, dtype=widest(backend), seed=seed)


@pytest.mark.parametrize(("rows", "columns"), [(tiles.ROWS, plan.COLUMNS), (16, 8), (5, 1)])
@settings(max_examples=40, deadline=None, suppress_health_check=SHARED_FIXTURE)
@given(drawn=any_ranges())
def test_a_plan_covers_what_is_seen_and_masks_what_is_not(rows, columns, monkeypatch, drawn):
    monkeypatch.setattr(plan, "COLUMNS", columns)
    ranges, n_keys = drawn
    mask = visible(ranges, n_keys)[0]
    for tile in plan.plan_tiles(ranges, n_keys, rows)[0]:
        keys = [key for start, end in tile.spans for key in range(start, end)]
        assert len(keys) == len(set(keys)) == tile.columns
        seen = mask[tile.start : tile.end]
        assert seen[:, keys].sum() == seen.sum()
        unmasked = torch.ones(tile.columns, dtype=torch.bool)
        for run in tile.masked:
            assert keys[run.start : run.end] == list(range(run.key, run.key + run.end - run.start))
            unmasked[run.start : run.end] = False
        assert seen[:, torch.tensor(keys, dtype=torch.int64)[unmasked]].all()
        if not keys:
            continue
        reaches_both_ends = keys[0] == 0 and keys[-1] == n_keys - 1
        assert tile.columns % columns == 0 or reaches_both_ends
        used = seen.any(0).nonzero()
        assert keys[0] > used.min() - columns
        assert keys[-1] < used.max() + columns


def test_tiles_keep_to_a_document_unless_it_is_short():
    """Documents of 200, 10, 90 and 30 tokens; a row of one tile is not filled up."""
    document_id = torch.arange(4).repeat_interleave(torch.tensor([200, 10, 90, 30]))[None]
    found = plan.plan_tiles(causal_ranges(document_id), 330, 128)[0]
    assert [(tile.start, tile.end, tile.height) for tile in found] == [
        (0, 128, 128),
        (128, 200, 96),
        (200, 300, 128),
        (300, 330, 32),
    ]
    assert found[2].spans == [(200, 328)]  # 100 keys, filled up to 128
    alone = plan.plan_tiles(causal_ranges(document_id[:, :90]), 90, 128)[0]
    assert [(tile.start, tile.end, tile.height) for tile in alone] == [(0, 90, 90)]


@pytest.mark.parametrize(("n_queries", "n_keys"), [(3, 200), (200, 3), (0, 4), (4, 0)])
def test_more_queries_than_keys_and_fewer(n_queries, n_keys, backend):
    last = torch.arange(n_queries) * n_keys // max(n_queries, 1)
    zero = torch.zeros_like(last)
    ranges = torch.stack((zero, last, last, zero + n_keys), -1)[None]
    if n_queries and n_keys:
        check(ranges, n_keys, backend=backend)
    else:
        q, kv = torch.ones(1, 2, n_queries, 4), torch.ones(1, 2, n_keys, 4, requires_grad=True)
        out = block_attention(q, kv, kv, ranges, backend=backend)
        assert out.shape == q.shape
        assert not out.any()


def test_projection_layout_and_expanded_gradients(backend):
    """[B,L,H,D] projections seen as [B,H,L,D], and the stride-0 gradient of a sum."""
    ranges = causal_ranges(torch.zeros(2, 30, dtype=torch.int64))
    leaf = torch.randn(2, 30, 3, 8, dtype=widest(backend), requires_grad=True)
    q = leaf.transpose(1, 2)
    (actual,) = torch.autograd.grad(block_attention(q, q, q, ranges, backend=backend).sum(), leaf)
    (wanted,) = torch.autograd.grad(dense_attention(q, q, q, ranges, 8**-0.5).sum(), leaf)
    tolerance = 3e-5 if backend == "triton" else 1e-10
    torch.testing.assert_close(actual, wanted, rtol=tolerance, atol=tolerance)


def test_the_same_input_gives_the_same_bits(backend):
    """Of out, lse, dq, dk and dv, where many queries add to one key and heads share it."""
    document_id, block_id = ids_of([[[7, 13, 20]]])
    ranges = two_stream_ranges(document_id, block_id, clean_stream="context_causal")
    inputs = [torch.randn(1, heads, ranges.shape[1], 16) for heads in (2, 1, 1)]
    grad_out = torch.randn(inputs[0].shape)
    runs = []
    for _ in range(2):
        # Elsewhere in memory, with a plan of their own.
        leaves = [x.clone().requires_grad_() for x in inputs]
        out, lse = block_attention(*leaves, ranges.clone(), backend=backend, return_lse=True)
        runs.append([out, lse, *torch.autograd.grad(out, leaves, grad_out)])
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_offsets_beyond_32_bits(backend):
    """Heads 2^31 elements apart, of which only the pages in use exist."""
    apart = (1 << 31) + 256
    storage = torch.UntypedStorage(2 * (apart + 40 * 64))
    far = torch.tensor([], dtype=torch.float16)
    far = far.set_(storage, 0, (1, 2, 40, 64), (0, apart, 64, 1))
    near = torch.randn(1, 2, 40, 64).half()
    far.copy_(near)
    ranges = causal_ranges(torch.zeros(1, 40, dtype=torch.int64))
    runs = []
    for x in (far, near):
        leaves = [x.detach().requires_grad_() for _ in range(3)]
        out = block_attention(*leaves, ranges, backend=backend)
        # As they lie: a gradient that autograd adds up itself would be copied side by side.
        runs.append((out, *torch.autograd.grad(out, leaves, x)))
    for one, other in zip(*runs, strict=True):
        assert torch.equal(one, other)


def test_autocast_does_not_lower_float32(backend):
    ranges = causal_ranges(torch.zeros(1, 40, dtype=torch.int64))
    q = torch.randn(1, 2, 40, 16, requires_grad=True)
    plain = block_attention(q, q, q, ranges, backend=backend)
    (gradient,) = torch.autograd.grad(plain.sum(), q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = block_attention(q, q, q, ranges, backend=backend)
        assert torch.equal(under, plain)
        if backend != "reference":  # autograd itself lowers the reference's backward products
            assert torch.equal(torch.autograd.grad(under.sum(), q)[0], gradient)


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_rows_that_see_nothing_make_no_nan_on_the_way(backend):
    q = torch.randn(1, 2, 20, 8, requires_grad=True)
    ranges = torch.zeros(1, 20, 4, dtype=torch.int64)
    ranges[0, 3] = torch.tensor([0, 5, 7, 9])
    with torch.autograd.detect_anomaly(check_nan=True):
        block_attention(q, q, q, ranges, backend=backend).sum().backward()


def test_large_bfloat16_scores_keep_their_differences():
    """Scores near 100 are rounded to halves in bfloat16; what is above the others must show it."""
    q = torch.tensor([[[[10.0, 0.5]]]], dtype=torch.bfloat16)
    k = torch.tensor([[[[10.0, 0.25], [10.0, 0.0]]]], dtype=torch.bfloat16)
    v = torch.tensor([[[[1.0, 0.0], [0.0, 1.0]]]], dtype=torch.bfloat16)
    ranges = torch.tensor([[[0, 2, 0, 0]]])
    out = block_attention(q, k, v, ranges, backend="tiles", scale=1.0)
    expected = torch.softmax(torch.tensor([100.125, 100.0]), 0)
    assert torch.allclose(out.flatten().float(), expected, atol=4e-3)


def test_bfloat16_gradients_of_equal_values_cancel():
    """Where all values are equal, dP - delta is 0 however badly delta itself rounds."""
    ranges = torch.tensor([[[0, 8, 0, 0]]]).expand(1, 200, 4)
    q = torch.zeros(1, 1, 200, 64, dtype=torch.bfloat16, requires_grad=True)
    k = torch.randn(1, 1, 8, 64).bfloat16()
    v = torch.randn(64).bfloat16().expand(1, 1, 8, 64)
    out = block_attention(q, k, v, ranges, backend="tiles")
    (grad_q,) = torch.autograd.grad(out, q, torch.randn(q.shape).bfloat16())
    assert grad_q.abs().max() < 1e-3


def test_tiles_hold_nothing_of_queries_times_keys():
    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.numel = max(self.numel, result.numel())
            return result

    length = 1024
    block_id = (torch.arange(length) // 24)[None]
    ranges = two_stream_ranges(torch.zeros_like(block_id), block_id, clean_stream="context_causal")
    q = torch.randn(1, 1, 2 * length, 8, requires_grad=True)
    with Largest() as largest:
        block_attention(q, q, q, ranges, backend="tiles").sum().backward()
    assert largest.numel <= tiles.ROWS * 2 * length


def test_tiles_refuse_a_second_derivative():
    ranges = causal_ranges(torch.zeros(1, 4, dtype=torch.int64))
    q = torch.randn(1, 1, 4, 4, requires_grad=True)
    out = block_attention(q, q, q, ranges, backend="tiles")
    (gradient,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="grad"):
        gradient.sum().backward()


def test_bf16_gradients_survive_an_attention_sink() -> None:
    """One key takes nearly all the weight: what is left of dq and dk must not be rounding error.

    With delta taken from the rounded output the error was 4 %; a pretrained model's first layers
    look like this.
    """
    torch.manual_seed(0)
    ranges = causal_ranges(torch.zeros(1, 256, dtype=torch.long))
    sink = torch.randn(64)
    q, k, v, grad = (torch.randn(1, 2, 256, 64) for _ in range(4))
    q, v = q * 0.3 + sink, torch.cat((v[:, :, :1] * 0.05, v[:, :, 1:]), dim=2)
    k = torch.cat((sink.expand(1, 2, 1, 64), k[:, :, 1:]), dim=2)
    inputs = [x.to(torch.bfloat16) for x in (q, k, v)]

    def gradients(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.detach().clone().to(dtype).requires_grad_() for x in inputs]
        if dtype == torch.float64:
            out = torch.nn.functional.scaled_dot_product_attention(*leaves, is_causal=True)
        else:
            out = block_attention(*leaves, ranges, backend="tiles")
        out.backward(grad.to(torch.bfloat16).to(dtype))
        return [leaf.grad.double() for leaf in leaves if leaf.grad is not None]

    for found, true in zip(gradients(torch.bfloat16), gradients(torch.float64), strict=True):
        assert (found - true).norm() < 0.02 * true.norm()
