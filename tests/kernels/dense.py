"""Block attention in float64 by the definition, what is held against it, and the layouts to try.

Letters: B batch, H query heads, G kv heads, M queries, N keys, D head dim, L tokens of a row.
"""

from __future__ import annotations

import torch
from abf_kernels.block_attention.api import block_attention
from hypothesis import strategies as st

from tests.kernels.fresh import fresh

# Largest error over largest value. bfloat16 keeps 8 bits, and dS = P (dP - delta) cancels.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 3e-2,
}


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


def check(
    ranges, n_keys, *, backend, dtype=torch.float32, heads=(2, 2), dim=16, scale=None, seed=None
):
    """Values, dQ, dK and dV against float64, and exact zeros where nothing is seen."""
    generator = fresh(seed)
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
    "straddling_tiles": [[[100, 60, 20]]],
    "ragged_tail": [[[5, 9, 2, 20, 1, 30, 13, 11]]],
    "several_documents": [[[4, 7], [1], [30, 2, 11], [3, 3, 3, 3]]],
    "rows_that_differ": [[[20, 20], [17, 3]], [[1, 2, 3, 4], [50]], [[60]]],
    "padding": [[[5, 6], [-4], [10, 7], [-9]], [[-3], [20], [8], [-10]]],
    "only_padding": [[[-33]]],
}


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
