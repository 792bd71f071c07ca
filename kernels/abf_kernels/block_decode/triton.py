"""Decoding attention over pages, split over keys: one program a tile of a request's queries.

Letters: B requests, N query rows, H query heads, G kv heads, R = H/G, D head dim, S keys of a page,
n cached keys of a request. A row of a tile is a query in one of the R heads that share keys. Parts
of a request's history of SHARE keys each go to programs of their own; its new keys follow the last
part. `_attend` writes the answer itself where no request has two parts, else `_gather` merges them.
"""

# What kernels do with tensors and constants is beyond Python's types:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import knobs

from abf_kernels.block_decode.configs import SHARE, choose, merging
from abf_kernels.block_decode.requests import Requests

INTERPRETED = bool(knobs.runtime.interpret)
LOG2E = 1.4426950408889634


@triton.jit
def _rows(request, group, tile, queries, R: tl.constexpr, BLOCK_M: tl.constexpr):
    """Query rows and heads of a tile, and which of them there are."""
    first = tl.load(queries + 2 * request)
    last = tl.load(queries + 2 * request + 1)
    at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    row = first + at // R
    return row, group * R + at % R, row < last


@triton.jit
def _step(
    x, left, right, column, seen, top, total, acc, scale,
    at_d, D: tl.constexpr,
):  # fmt: skip
    """Online softmax, in base 2, over a tile of keys at `left` and values at `right` [BLOCK_N]:
    `column` are there, `seen` [BLOCK_M, BLOCK_N] visible."""
    inside = at_d < D
    keys = tl.load(left[None, :] + at_d[:, None], mask=column[None, :] & inside[:, None], other=0.0)
    values = tl.load(
        right[:, None] + at_d[None, :], mask=column[:, None] & inside[None, :], other=0.0
    )
    scores = tl.where(seen, tl.dot(x, keys, input_precision="ieee") * scale, float("-inf"))
    # NaN goes on through the sums; maxima of it are not the same everywhere.
    higher = tl.maximum(top, tl.max(tl.where(scores == scores, scores, float("-inf")), 1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(values.dtype), values, acc * shrink[:, None], input_precision="ieee")
    return higher, total, acc


@triton.jit
def _attend(
    q, k, v, keys, values, table, lengths, queries, own, seen, out, lse,
    scale, N, H, parts, pages_each, page_size,
    stride_qn, stride_qh, stride_kn, stride_kg, stride_vn, stride_vg,
    stride_keys_c, stride_keys_g, stride_keys_s, stride_values_c, stride_values_g, stride_values_s,
    HAS_HISTORY: tl.constexpr, HAS_OWN: tl.constexpr, R: tl.constexpr, D: tl.constexpr,
    SHARE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of queries over one part of their keys: out [parts,N,H,D] and lse [parts,N,H]."""
    tile, part = tl.program_id(0) // parts, tl.program_id(0) % parts
    group, request = tl.program_id(1), tl.program_id(2)
    row, head, inside = _rows(request, group, tile, queries, R, BLOCK_M)
    n = 0
    if HAS_HISTORY:
        n = tl.load(lengths + request)
    used = tl.maximum(tl.cdiv(n, SHARE), 1)
    # Queries and parts are ragged; the grid is as large as the largest request.
    if (tl.max(inside.to(tl.int32), 0) > 0) & (part < used):
        at_d, at_n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_N)
        wide_row, wide_group = row.to(tl.int64), group.to(tl.int64)
        visible = inside[:, None] & (at_d < D)[None, :]
        at_q = wide_row * stride_qn + head.to(tl.int64) * stride_qh
        x = tl.load(q + at_q[:, None] + at_d[None, :], mask=visible, other=0.0)
        # Finite, so that nothing below is inf - inf: exp2(-1e30 - m) is 0 whatever m.
        top = tl.full((BLOCK_M,), -1e30, tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
        if HAS_HISTORY:
            last = tl.minimum(part * SHARE + SHARE, n)
            for start in range(part * SHARE, last, BLOCK_N):
                at = start + at_n
                column = at < last
                page = tl.load(
                    table + request.to(tl.int64) * pages_each + at // page_size,
                    mask=column,
                    other=0,
                ).to(tl.int64)
                slot = (at % page_size).to(tl.int64)
                left = keys + page * stride_keys_c + slot * stride_keys_s
                right = values + page * stride_values_c + slot * stride_values_s
                top, total, acc = _step(
                    x, left + wide_group * stride_keys_g, right + wide_group * stride_values_g,
                    column, inside[:, None] & column[None, :], top, total, acc, scale, at_d, D,
                )  # fmt: skip
        if HAS_OWN and part == used - 1:
            limit = tl.load(seen + row, mask=inside, other=0)
            first = tl.load(own + 2 * request)
            size = tl.load(own + 2 * request + 1) - first
            for start in range(0, size, BLOCK_N):
                at = start + at_n
                here = (first + at).to(tl.int64)
                top, total, acc = _step(
                    x, k + here * stride_kn + wide_group * stride_kg,
                    v + here * stride_vn + wide_group * stride_vg,
                    at < size, at[None, :] < limit[:, None], top, total, acc, scale, at_d, D,
                )  # fmt: skip
        # What sees nothing is answered with 0.
        some = tl.where(total == 0.0, 1.0, total)
        acc = acc / some[:, None]
        norm = tl.where(total == 0.0, float("-inf"), (top + tl.log2(some)) * 0.6931471805599453)
        at_out = (part.to(tl.int64) * N + wide_row) * H + head
        tl.store(lse + at_out, norm, mask=inside)
        held = out + at_out[:, None] * D + at_d[None, :]
        tl.store(held, acc.to(out.dtype.element_ty), mask=visible)


@triton.jit
def _gather(
    parts_out, parts_lse, lengths, queries, out, lse, N, H,
    R: tl.constexpr, D: tl.constexpr, SHARE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Merge a request's parts: out [N,H,D] and lse [N,H]."""
    group, request = tl.program_id(1), tl.program_id(2)
    row, head, inside = _rows(request, group, tl.program_id(0), queries, R, BLOCK_M)
    used = tl.maximum(tl.cdiv(tl.load(lengths + request), SHARE), 1)
    at_d = tl.arange(0, BLOCK_D)
    visible = inside[:, None] & (at_d < D)[None, :]
    at_row = row.to(tl.int64) * H + head
    top = tl.full((BLOCK_M,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_M,), tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    for part in range(0, used):
        at = at_row + tl.cast(part, tl.int64) * N * H
        norm = tl.load(parts_lse + at, mask=inside, other=float("-inf"))
        more = tl.load(parts_out + at[:, None] * D + at_d[None, :], mask=visible, other=0.0)
        higher = tl.maximum(top, norm)
        weight, shrink = tl.exp(norm - higher), tl.exp(top - higher)
        total = total * shrink + weight
        acc = acc * shrink[:, None] + more * weight[:, None]
        top = higher
    some = tl.where(total == 0.0, 1.0, total)
    acc = acc / some[:, None]
    norm = tl.where(total == 0.0, float("-inf"), top + tl.log(some))
    tl.store(lse + at_row, norm, mask=inside)
    held = out + at_row[:, None] * D + at_d[None, :]
    tl.store(held, acc.to(out.dtype.element_ty), mask=visible)


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    asked: Requests,
    scale: float,
    *,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """[N,H,D], in float32 if `wide`, and log-sum-exp [N,H] over the parts that are given."""
    N, H, D = q.shape
    new, pages = k is not None and v is not None, keys is not None and values is not None
    given = keys if keys is not None else k
    assert given is not None
    G, B = given.shape[1], len(asked.lengths)
    out = torch.zeros(q.shape, dtype=torch.float32 if wide else q.dtype, device=q.device)
    lse = torch.full((N, H), -torch.inf, device=q.device)
    config = choose(q.device, q.dtype, D)
    host = asked.host
    most = max(last - first for first, last in host.queries)
    tiles = triton.cdiv(most * (H // G), config.rows)
    parts = max(1, triton.cdiv(max(host.lengths), SHARE)) if pages else 1
    each_out, each_lse = out, lse
    if parts > 1:
        each_out = torch.empty(parts, N, H, D, device=q.device)
        each_lse = torch.empty(parts, N, H, device=q.device)
    sizes = {"R": H // G, "D": D, "SHARE": SHARE, **config.launch(D)}
    k, v = (q, q) if k is None or v is None else (k, v)
    keys, values = (q[None], q[None]) if keys is None or values is None else (keys, values)
    _attend[(tiles * parts, G, B)](
        q, k, v, keys, values, asked.table, asked.lengths, asked.queries, asked.own, asked.seen,
        each_out, each_lse, scale * LOG2E, N, H, parts, asked.table.shape[1], asked.page_size,
        *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *keys.stride()[:3],
        *values.stride()[:3], HAS_HISTORY=pages, HAS_OWN=new, **sizes,
    )  # fmt: skip
    if parts > 1:
        sizes = {"R": H // G, "D": D, "SHARE": SHARE, **merging(D)}
        tiles = triton.cdiv(most * (H // G), sizes["BLOCK_M"])
        _gather[(tiles, G, B)](
            each_out, each_lse, asked.lengths, asked.queries, out, lse, N, H, **sizes
        )
    return out, lse
