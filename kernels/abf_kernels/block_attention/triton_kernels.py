"""Triton kernels of block attention: forward, dQ, and dK with dV.

Letters: B batch, H query heads, G kv heads, R = H/G, M queries, N keys, D head dim; a program has a
tile of ROWS queries or KEYS keys and goes over tiles of the other. Strides are named stride_, the
tensor, the axis (b, h or g, m or n); D has stride 1. Scores are in base 2: `scale` carries log2 e.

Whole-tensor offsets are 64-bit (a tile's first row, times its stride), those within a tile 32-bit.
No argument that varies with the data is a constexpr or specialised, so nothing is compiled again.
Accumulation is in float32. There are no atomics: the same input gives the same bits.
"""
# Triton's own types make no sense of what kernels are called with.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _parts(bound, KEYS: tl.constexpr):
    """A range's span [lo,hi) in tiles of KEYS from lo on: (lo, hi, tiles to mask, of these before
    the unmasked ones, unmasked tiles)."""
    lo, full_lo, full_hi = tl.load(bound), tl.load(bound + 1), tl.load(bound + 2)
    hi = tl.load(bound + 3)
    before = tl.cdiv(full_lo - lo, KEYS)
    full = tl.maximum((full_hi - lo) // KEYS - before, 0)
    return lo, hi, tl.cdiv(hi - lo, KEYS) - full, before, full


@triton.jit
def _edge(
    j, lo_a, hi_a, edge_a, before_a, full_a, lo_b, hi_b, before_b, full_b, KEYS: tl.constexpr
):
    """The j-th tile to mask: (is it range a's, its first key, the end of its span)."""
    in_a = j < edge_a
    tile = tl.where(in_a, j, j - edge_a)
    tile += tl.where(tile >= tl.where(in_a, before_a, before_b), tl.where(in_a, full_a, full_b), 0)
    return in_a, tl.where(in_a, lo_a, lo_b) + tile * KEYS, tl.where(in_a, hi_a, hi_b)


@triton.jit
def _ranges_of(ranges, batch, row, M, which):
    at = ranges + (batch * M + row) * 4 + 2 * which
    return tl.load(at, mask=row < M, other=0), tl.load(at + 1, mask=row < M, other=0)


@triton.jit
def _softmax_step(s, v, acc, top, total, scale, MASKED: tl.constexpr, PRECISION: tl.constexpr):
    """Online softmax over a tile: v [KEYS,D], and s [ROWS,KEYS], already scaled if it is MASKED."""
    if MASKED:
        higher = tl.maximum(top, tl.max(s, 1))
        # -inf - -inf is NaN; a row that has seen nothing yet subtracts 0 instead.
        base = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.math.exp2(s - base[:, None])
    else:
        # Scaled after the maximum (scale >= 0), so that a score costs one fused multiply-add.
        higher = tl.maximum(top, tl.max(s, 1) * scale)
        base = higher
        p = tl.math.exp2(s * scale - base[:, None])
    shrink = tl.math.exp2(top - base)
    total = total * shrink + tl.sum(p, 1)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, higher, total


@triton.jit(do_not_specialize=["M", "N", "tiles"])
def forward_kernel(
    q, k, v, out, rest, lse, ranges, bounds, scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vg, stride_vn, stride_ob, stride_oh, stride_om,
    H, R, M, N, tiles,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """out = softmax(scale q k^T) v and lse [B,H,M] (base 2, -inf where nothing is seen).

    KEEP: also write to `rest`, laid out like `out`, what rounding took from `out`.
    Grid B*H*tiles: the tiles of one head side by side, which share its keys in the cache.
    """
    tile = tiles - 1 - tl.program_id(0) % tiles  # late queries see most keys: begin with these
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // H, batch_head % H
    first = tile * ROWS
    row, key, dim = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, D)
    inside = first + row < M

    q += batch * stride_qb + head * stride_qh + first.to(tl.int64) * stride_qm
    k += batch * stride_kb + (head // R) * stride_kg
    v += batch * stride_vb + (head // R) * stride_vg
    at_k = key[:, None] * stride_kn + dim[None, :]
    at_v = key[:, None] * stride_vn + dim[None, :]
    q_tile = tl.load(q + row[:, None] * stride_qm + dim[None, :], mask=inside[:, None], other=0.0)
    bound = bounds + (batch * tiles + tile) * 8
    lo_a, hi_a, edge_a, before_a, full_a = _parts(bound, KEYS)
    lo_b, hi_b, edge_b, before_b, full_b = _parts(bound + 4, KEYS)

    acc = tl.zeros((ROWS, D), tl.float32)
    top = tl.full((ROWS,), float("-inf"), tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    for j in tl.range(0, full_a + full_b):
        start = tl.where(j < full_a, lo_a + before_a * KEYS, lo_b + (before_b - full_a) * KEYS)
        n = (start + j * KEYS).to(tl.int64)
        k_tile = tl.load(k + n * stride_kn + at_k)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        v_tile = tl.load(v + n * stride_vn + at_v)
        acc, top, total = _softmax_step(s, v_tile, acc, top, total, scale, False, PRECISION)

    a0, a1 = _ranges_of(ranges, batch, first + row, M, 0)
    b0, b1 = _ranges_of(ranges, batch, first + row, M, 1)
    for j in tl.range(0, edge_a + edge_b):
        in_a, n, hi = _edge(
            j, lo_a, hi_a, edge_a, before_a, full_a, lo_b, hi_b, before_b, full_b, KEYS
        )
        # Keys past the span are not read: what is there may be no number.
        valid = (n + key < hi)[:, None]
        k_tile = tl.load(k + n.to(tl.int64) * stride_kn + at_k, mask=valid, other=0.0)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION) * scale
        low, high = tl.where(in_a, a0, b0), tl.where(in_a, a1, b1)
        seen = (n + key[None, :] >= low[:, None]) & (n + key[None, :] < high[:, None])
        s = tl.where(seen, s, float("-inf"))
        v_tile = tl.load(v + n.to(tl.int64) * stride_vn + at_v, mask=valid, other=0.0)
        acc, top, total = _softmax_step(s, v_tile, acc, top, total, scale, True, PRECISION)

    blind = total == 0.0
    acc = acc / tl.where(blind, 1.0, total)[:, None]
    tl.store(
        lse + batch_head * M + first + row,
        tl.where(blind, float("-inf"), top + tl.math.log2(tl.where(blind, 1.0, total))),
        mask=inside,
    )
    at_out = batch * stride_ob + head * stride_oh + first.to(tl.int64) * stride_om
    at_out += row[:, None] * stride_om + dim[None, :]
    rounded = acc.to(out.dtype.element_ty)
    tl.store(out + at_out, rounded, mask=inside[:, None])
    if KEEP:
        lost = (acc - rounded.to(tl.float32)).to(rest.dtype.element_ty)
        tl.store(rest + at_out, lost, mask=inside[:, None])


@triton.jit(do_not_specialize=["M", "N", "tiles"])
def dq_kernel(
    q, k, v, out, rest, grad_out, lse, ranges, bounds, delta, dq, scale, grad_scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vg, stride_vn, stride_ob, stride_oh, stride_om,
    stride_gb, stride_gh, stride_gm, stride_db, stride_dh, stride_dm,
    H, R, M, N, tiles,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """dq, and delta [B,H,M], the sum over D of grad_out (out + rest); grid as forward_kernel's."""
    tile = tiles - 1 - tl.program_id(0) % tiles
    batch_head = (tl.program_id(0) // tiles).to(tl.int64)
    batch, head = batch_head // H, batch_head % H
    first = tile * ROWS
    row, key, dim = tl.arange(0, ROWS), tl.arange(0, KEYS), tl.arange(0, D)
    inside = first + row < M
    start_row = first.to(tl.int64)

    q += batch * stride_qb + head * stride_qh + start_row * stride_qm
    q_tile = tl.load(q + row[:, None] * stride_qm + dim[None, :], mask=inside[:, None], other=0.0)
    grad_out += batch * stride_gb + head * stride_gh + start_row * stride_gm
    g_tile = tl.load(
        grad_out + row[:, None] * stride_gm + dim[None, :], mask=inside[:, None], other=0.0
    )
    at_out = batch * stride_ob + head * stride_oh + start_row * stride_om
    at_out += row[:, None] * stride_om + dim[None, :]
    o_tile = tl.load(out + at_out, mask=inside[:, None], other=0.0).to(tl.float32)
    if KEEP:
        o_tile += tl.load(rest + at_out, mask=inside[:, None], other=0.0).to(tl.float32)
    row_delta = tl.sum(g_tile.to(tl.float32) * o_tile, 1)
    at_row = batch_head * M + first + row
    tl.store(delta + at_row, row_delta, mask=inside)
    row_lse = tl.load(lse + at_row, mask=inside, other=0.0)
    row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)

    k += batch * stride_kb + (head // R) * stride_kg
    v += batch * stride_vb + (head // R) * stride_vg
    at_k = key[:, None] * stride_kn + dim[None, :]
    at_v = key[:, None] * stride_vn + dim[None, :]
    bound = bounds + (batch * tiles + tile) * 8
    lo_a, hi_a, edge_a, before_a, full_a = _parts(bound, KEYS)
    lo_b, hi_b, edge_b, before_b, full_b = _parts(bound + 4, KEYS)

    acc = tl.zeros((ROWS, D), tl.float32)
    for j in tl.range(0, full_a + full_b):
        start = tl.where(j < full_a, lo_a + before_a * KEYS, lo_b + (before_b - full_a) * KEYS)
        n = (start + j * KEYS).to(tl.int64)
        k_tile = tl.load(k + n * stride_kn + at_k)
        v_tile = tl.load(v + n * stride_vn + at_v)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        dp = tl.dot(g_tile, v_tile.T, input_precision=PRECISION)
        p = tl.math.exp2(s * scale - row_lse[:, None])
        ds = p * (dp - row_delta[:, None])
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)

    a0, a1 = _ranges_of(ranges, batch, first + row, M, 0)
    b0, b1 = _ranges_of(ranges, batch, first + row, M, 1)
    for j in tl.range(0, edge_a + edge_b):
        in_a, n, hi = _edge(
            j, lo_a, hi_a, edge_a, before_a, full_a, lo_b, hi_b, before_b, full_b, KEYS
        )
        valid = (n + key < hi)[:, None]
        k_tile = tl.load(k + n.to(tl.int64) * stride_kn + at_k, mask=valid, other=0.0)
        v_tile = tl.load(v + n.to(tl.int64) * stride_vn + at_v, mask=valid, other=0.0)
        s = tl.dot(q_tile, k_tile.T, input_precision=PRECISION)
        dp = tl.dot(g_tile, v_tile.T, input_precision=PRECISION)
        low, high = tl.where(in_a, a0, b0), tl.where(in_a, a1, b1)
        seen = (n + key[None, :] >= low[:, None]) & (n + key[None, :] < high[:, None])
        p = tl.where(seen, tl.math.exp2(s * scale - row_lse[:, None]), 0.0)
        ds = tl.where(p == 0.0, 0.0, p * (dp - row_delta[:, None]))
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision=PRECISION)

    dq += batch * stride_db + head * stride_dh + start_row * stride_dm
    tl.store(
        dq + row[:, None] * stride_dm + dim[None, :],
        (acc * grad_scale).to(dq.dtype.element_ty),
        mask=inside[:, None],
    )


@triton.jit
def _add_queries(
    j, entry, dk, dv, k_tile, v_tile, q, grad_out, lse, delta, ranges, entries, batch, group, n,
    scale, n_listed, listed, step,
    stride_qb, stride_qh, stride_qm, stride_gb, stride_gh, stride_gm, H, R, M,
    D: tl.constexpr, ROWS: tl.constexpr, MASKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add to dk and dv [KEYS,D] what the j-th pair (head of the group, listed tile) gives; `entry`
    is that tile's. Returns the next pair's, read early: the copies of its tile wait for it."""
    head = group * R + j // n_listed
    next_entry = tl.load(entries + listed + step * ((j + 1) % n_listed))
    first = (entry // 2) * ROWS
    row, dim = tl.arange(0, ROWS), tl.arange(0, D)
    inside = first + row < M
    start_row = first.to(tl.int64)
    at_q = batch * stride_qb + head * stride_qh + start_row * stride_qm
    at_g = batch * stride_gb + head * stride_gh + start_row * stride_gm
    q_tile = tl.load(
        q + at_q + row[:, None] * stride_qm + dim[None, :], mask=inside[:, None], other=0.0
    )
    g_tile = tl.load(
        grad_out + at_g + row[:, None] * stride_gm + dim[None, :], mask=inside[:, None], other=0.0
    )
    at_row = (batch * H + head) * M + first + row
    # Past the last query all of q, grad_out and delta are 0, so its p of 1 adds nothing.
    row_lse = tl.load(lse + at_row, mask=inside, other=0.0)
    row_delta = tl.load(delta + at_row, mask=inside, other=0.0)
    s = tl.dot(k_tile, q_tile.T, input_precision=PRECISION)
    if MASKED:
        row_lse = tl.where(row_lse == float("-inf"), 0.0, row_lse)
        low, high = _ranges_of(ranges, batch, first + row, M, entry % 2)
        seen = (n[:, None] >= low[None, :]) & (n[:, None] < high[None, :])
        p = tl.where(seen, tl.math.exp2(s * scale - row_lse[None, :]), 0.0)
    else:
        p = tl.math.exp2(s * scale - row_lse[None, :])
    dv = tl.dot(p.to(g_tile.dtype), g_tile, dv, input_precision=PRECISION)
    dp = tl.dot(v_tile, g_tile.T, input_precision=PRECISION)
    ds = p * (dp - row_delta[None, :])
    if MASKED:
        ds = tl.where(p == 0.0, 0.0, ds)  # a key that nobody sees may be no number, and dp neither
    dk = tl.dot(ds.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return next_entry, dk, dv


@triton.jit(do_not_specialize=["M", "N", "tiles", "max_entries"])
def dkv_kernel(
    q, k, v, grad_out, lse, delta, ranges, entries, counts, dk, dv, scale, grad_scale,
    stride_qb, stride_qh, stride_qm, stride_kb, stride_kg, stride_kn,
    stride_vb, stride_vg, stride_vn, stride_gb, stride_gh, stride_gm,
    stride_db, stride_dg, stride_dn, stride_eb, stride_eg, stride_en,
    H, R, M, N, tiles, max_entries,
    D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (strides d) and dv (strides e) of a tile of keys, from the query tiles listed for it by
    `triton_plan.touching_kernel`, of all heads that share the keys. Grid B*G*tiles."""
    tile = tl.program_id(0) % tiles
    batch_group = (tl.program_id(0) // tiles).to(tl.int64)
    batch, group = batch_group // (H // R), batch_group % (H // R)
    first = tile * KEYS
    start = first.to(tl.int64)
    key, dim = tl.arange(0, KEYS), tl.arange(0, D)
    inside = (first + key < N)[:, None]
    k += batch * stride_kb + group * stride_kg + start * stride_kn
    v += batch * stride_vb + group * stride_vg + start * stride_vn
    k_tile = tl.load(k + key[:, None] * stride_kn + dim[None, :], mask=inside, other=0.0)
    v_tile = tl.load(v + key[:, None] * stride_vn + dim[None, :], mask=inside, other=0.0)
    place = batch * tiles + tile
    n_full = tl.load(counts + place * 2)
    n_partial = tl.load(counts + place * 2 + 1)
    listed = place * max_entries

    grad_k = tl.zeros((KEYS, D), tl.float32)
    grad_v = tl.zeros((KEYS, D), tl.float32)
    # Where nothing is listed this is not written, and not used.
    entry = tl.load(entries + listed)
    for j in tl.range(0, R * n_full):
        entry, grad_k, grad_v = _add_queries(
            j, entry, grad_k, grad_v, k_tile, v_tile, q, grad_out, lse, delta, ranges, entries,
            batch, group, first + key, scale, n_full, listed, 1,
            stride_qb, stride_qh, stride_qm, stride_gb, stride_gh, stride_gm,
            H, R, M, D, ROWS, False, PRECISION,
        )  # fmt: skip
    entry = tl.load(entries + listed + max_entries - 1)
    for j in tl.range(0, R * n_partial):
        entry, grad_k, grad_v = _add_queries(
            j, entry, grad_k, grad_v, k_tile, v_tile, q, grad_out, lse, delta, ranges, entries,
            batch, group, first + key, scale, n_partial, listed + max_entries - 1, -1,
            stride_qb, stride_qh, stride_qm, stride_gb, stride_gh, stride_gm,
            H, R, M, D, ROWS, True, PRECISION,
        )  # fmt: skip

    dk += batch * stride_db + group * stride_dg + start * stride_dn
    dv += batch * stride_eb + group * stride_eg + start * stride_en
    at_k = key[:, None] * stride_dn + dim[None, :]
    at_v = key[:, None] * stride_en + dim[None, :]
    tl.store(dk + at_k, (grad_k * grad_scale).to(dk.dtype.element_ty), mask=inside)
    tl.store(dv + at_v, grad_v.to(dv.dtype.element_ty), mask=inside)
