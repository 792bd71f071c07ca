"""Block attention: both back ends against a float64 dense computation written out here by itself.

Letters: B batch, H query heads, G kv heads, M queries, N keys, D head dim, L tokens of a row.
"""

from __future__ import annotations

import math

import pytest
import torch
from abf_kernels.block_attention import plan, tiles
from abf_kernels.block_attention.api import block_attention
from abf_kernels.block_attention.metadata import causal_ranges, two_stream_ranges
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

SHARED_FIXTURE = [HealthCheck.function_scoped_fixture]  # it holds for every example alike
# Largest error over largest value. bfloat16 keeps 8 bits, and dS = P (dP - delta) cancels.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 3e-2,
}


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory(monkeypatch):
    """Whatever a back end reads before writing turns its results into NaN."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return wrapper

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))


@pytest.fixture(autouse=True)
def one_thread():
    """On a shared machine a second thread mostly waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=["reference", "tiles", "small tiles"])
def backend(request, monkeypatch):
    """Each back end; `tiles` also with constants that cut these small inputs into many tiles."""
    if request.param == "small tiles":
        monkeypatch.setattr(tiles, "ROWS", 16)
        monkeypatch.setattr(tiles, "SCRATCH", 1000)
        monkeypatch.setattr(plan, "COLUMNS", 8)
    return request.param.removeprefix("small ")


def visible(ranges, n_keys):
    """Bool [B,M,N] by looking at every row by itself."""
    mask = torch.zeros(*ranges.shape[:2], n_keys, dtype=torch.bool)
    for row, queries in enumerate(ranges.tolist()):
        for query, (a0, a1, b0, b1) in enumerate(queries):
            mask[row, query, a0:a1] = True
            mask[row, query, b0:b1] = True
    return mask


def dense_attention(q, k, v, ranges, scale):
    """Float64: exponentials over seen keys, over their sum; nothing seen, nothing returned."""
    q, k, v = q.double(), k.double(), v.double()
    repeat = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(repeat, dim=1) for x in (k, v))
    mask = visible(ranges, k.shape[2])[:, None]
    scores = torch.einsum("bhmd,bhnd->bhmn", q, k) * scale
    top = torch.where(mask, scores, -torch.inf).amax(-1, keepdim=True)
    top = torch.where(mask.any(-1, keepdim=True), top, 0.0).detach()
    weights = torch.where(mask, torch.exp(torch.where(mask, scores - top, 0.0)), 0.0)
    total = weights.sum(-1, keepdim=True)
    return torch.einsum("bhmn,bhnd->bhmd", weights / torch.where(total > 0, total, 1.0), v)


def with_gradients(attention, inputs, grad_out):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*inputs)
    return [out.detach(), *torch.autograd.grad(out, inputs, grad_out.to(out.dtype))]


def check(ranges, n_keys, *, backend, dtype=torch.float32, heads=(2, 2), dim=16, scale=None):
    """Values, dQ, dK and dV against float64, and exact zeros where nothing is seen."""
    generator = torch.Generator().manual_seed(ranges.shape[1])
    batch, n_queries, _ = ranges.shape

    def draw(n_heads, rows):
        return torch.randn(batch, n_heads, rows, dim, generator=generator).to(dtype)

    q, k, v = draw(heads[0], n_queries), draw(heads[1], n_keys), draw(heads[1], n_keys)
    grad_out = draw(heads[0], n_queries)
    results = with_gradients(
        lambda *x: block_attention(*x, ranges, backend=backend, scale=scale), (q, k, v), grad_out
    )
    expected = with_gradients(
        lambda *x: dense_attention(*x, ranges, scale or dim**-0.5), (q, k, v), grad_out
    )
    for name, actual, wanted, like in zip(
        ("out", "dq", "dk", "dv"), results, expected, (q, q, k, v), strict=True
    ):
        assert actual.dtype == dtype
        assert actual.shape == like.shape
        error = (actual.double() - wanted.double()).abs().max()
        assert error <= TOLERANCE[dtype] * wanted.abs().max().clamp(min=1.0), (name, error)

    mask = visible(ranges, n_keys)
    blind = ~mask.any(2)
    unseen = ~mask.any(1)
    assert not results[0].transpose(1, 2)[blind].any()
    assert not results[1].transpose(1, 2)[blind].any()
    assert not results[2].transpose(1, 2)[unseen].any()
    assert not results[3].transpose(1, 2)[unseen].any()


def ids_of(rows):
    """Rows of documents of block lengths (negative: so much padding) -> document and block ids."""
    documents, blocks = [], []
    for row in rows:
        document_ids, block_ids, block = [], [], 0
        for document, lengths in enumerate(row):
            for length in lengths:
                document_ids += [document if length > 0 else -1] * abs(length)
                block_ids += [block] * abs(length)
                block += 1
        documents.append(document_ids)
        blocks.append(block_ids)
    return torch.tensor(documents), torch.tensor(blocks)


LAYOUTS = {
    "blocks_of_one": [[[1] * 40]],
    "one_block": [[[50]]],
    "longer_than_a_tile": [[[3, 150, 7]]],
    "straddling_tiles": [[[100, 60, 100, 40]]],
    "ragged_tail": [[[5, 9, 2, 20, 1, 30, 13, 11]]],
    "several_documents": [[[4, 7], [1], [30, 2, 11], [3, 3, 3, 3]]],
    "rows_that_differ": [[[20, 20], [17, 3]], [[1, 2, 3, 4], [50]], [[60]]],
    "padding": [[[5, 6], [-4], [10, 7], [-9]], [[-3], [20], [8], [-10]]],
    "only_padding": [[[-33]]],
}


@pytest.mark.parametrize("clean_stream", ["context_causal", "block_causal"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_stream_layouts(layout, clean_stream, backend):
    document_id, block_id = ids_of(LAYOUTS[layout])
    ranges = two_stream_ranges(document_id, block_id, clean_stream=clean_stream)
    check(ranges, 2 * document_id.shape[1], backend=backend)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("heads", [(2, 2), (6, 2), (4, 1)])
def test_dtypes_and_grouped_heads(heads, dtype, backend):
    document_id, block_id = ids_of(LAYOUTS["padding"])
    ranges = two_stream_ranges(document_id, block_id, clean_stream="context_causal")
    check(ranges, 2 * document_id.shape[1], backend=backend, dtype=dtype, heads=heads)


def test_causal_rows_with_int64_ranges_and_scale(backend):
    document_id, _ = ids_of(LAYOUTS["several_documents"])
    ranges = causal_ranges(document_id).long()
    check(ranges, document_id.shape[1], backend=backend, scale=0.7, dim=5)


@st.composite
def any_ranges(draw):
    """Ranges [1,M,4] of no layout at all: per row any two disjoint intervals, in either order."""
    n_keys = draw(st.integers(1, 40))
    rows = []
    for _ in range(draw(st.integers(1, 40))):
        cuts = sorted(draw(st.tuples(*[st.integers(0, n_keys)] * 4)))
        first, second = cuts[:2], cuts[2:]
        if draw(st.booleans()):
            first, second = second, first
        if draw(st.integers(0, 4)) == 0:
            first = [draw(st.integers(0, n_keys))] * 2
        rows.append(first + second)
    return torch.tensor([rows]), n_keys


@settings(max_examples=30, deadline=None, suppress_health_check=SHARED_FIXTURE)
@given(drawn=any_ranges())
def test_any_ranges_whatever_their_order(backend, drawn):
    ranges, n_keys = drawn
    check(ranges, n_keys, backend=backend, dtype=torch.float64)


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
    leaf = torch.randn(2, 30, 3, 8, dtype=torch.float64, requires_grad=True)
    q = leaf.transpose(1, 2)
    (actual,) = torch.autograd.grad(block_attention(q, q, q, ranges, backend=backend).sum(), leaf)
    (wanted,) = torch.autograd.grad(dense_attention(q, q, q, ranges, 8**-0.5).sum(), leaf)
    assert torch.allclose(actual, wanted, rtol=1e-10, atol=1e-12)


def test_autocast_does_not_lower_float32(backend):
    ranges = causal_ranges(torch.zeros(1, 40, dtype=torch.int64))
    q = torch.randn(1, 2, 40, 16, requires_grad=True)
    plain = block_attention(q, q, q, ranges, backend=backend)
    (gradient,) = torch.autograd.grad(plain.sum(), q)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = block_attention(q, q, q, ranges, backend=backend)
        assert torch.equal(under, plain)
        if backend == "tiles":  # autograd itself lowers the reference's backward products
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
