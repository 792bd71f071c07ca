"""Cross-entropy by vocabulary tiles: logits live in registers, and for gradients a slice at a time.

Letters: R rows, d width, V vocabulary, k likeliest tokens, K the power of two that holds them, N
splits of the vocabulary. `_sweep` goes once over the vocabulary with an online log-sum-exp; splits
are merged afterwards, so that few rows fill a GPU as well. `_slope` computes the logits of a slice
of the vocabulary again for the gradients. Nothing is added atomically: results do not depend on the
order in which programs run.
"""

# What kernels do with tensors and constants is beyond Python's types:
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# pyright: reportIndexIssue=false, reportOperatorIssue=false, reportReturnType=false

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable
from triton import knobs

from abf_kernels.masked_loss.configs import SLICE, Config, choose

INTERPRETED = bool(knobs.runtime.interpret)
PROGRAMS = 256
"""Programs wanted at least: two on each multiprocessor of the largest GPUs."""
GRID = (1 << 16) - 1
"""Programs that the second axis of a GPU's grid has at most."""


@triton.jit
def _logits(
    hidden, matrix, rows, columns, R, V, d, stride_h, stride_m,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_V] in float32; 0 where there is no such row or column."""
    total = tl.zeros((BLOCK_R, BLOCK_V), tl.float32)
    at = tl.arange(0, BLOCK_D)
    left = hidden + rows.to(tl.int64)[:, None] * stride_h + at[None, :]
    right = matrix + columns.to(tl.int64)[None, :] * stride_m + at[:, None]
    for start in range(0, d, BLOCK_D):
        inside = start + at < d
        x = tl.load(left + start, mask=(rows < R)[:, None] & inside[None, :], other=0.0)
        y = tl.load(right + start, mask=(columns < V)[None, :] & inside[:, None], other=0.0)
        total = tl.dot(x, y, total, input_precision="ieee")
    return total


@triton.jit
def _sweep(
    hidden, matrix, target, sums, candidates, ids, R, V, d, stride_h, stride_m, share,
    HAS_TARGET: tl.constexpr, HAS_TOP: tl.constexpr, K: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row tile over one split of the vocabulary, `share` tokens long.

    Writes sums [4,N,R]: the largest logit m, the sum of exp(l - m), that of exp(l - m)(l - m), the
    target's logit (0 in other splits); and, if asked, the K largest logits and their ids, [N,R,K],
    unordered.
    """
    split = tl.program_id(1)
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    first = split * share
    last = tl.minimum(first + share, V)
    # Finite, so that nothing below is inf - inf: exp(-1e30 - m) is 0 whatever m.
    top = tl.full((BLOCK_R,), -1e30, tl.float32)
    total = tl.zeros((BLOCK_R,), tl.float32)
    spread = tl.zeros((BLOCK_R,), tl.float32)
    picked = tl.zeros((BLOCK_R,), tl.float32)
    wanted = tl.full((BLOCK_R,), -1, tl.int32)
    if HAS_TARGET:
        wanted = tl.load(target + rows, mask=rows < R, other=-1).to(tl.int32)
    place = tl.arange(0, K)
    # An empty place has an id of its own above all others, so that it is taken first.
    best = tl.full((BLOCK_R, K), float("-inf"), tl.float32)
    names = tl.zeros((BLOCK_R, K), tl.int32) + (V + place)[None, :]
    for start in range(first, last, BLOCK_V):
        columns = start + tl.arange(0, BLOCK_V)
        logits = _logits(
            hidden, matrix, rows, columns, R, last, d, stride_h, stride_m, BLOCK_R, BLOCK_V, BLOCK_D
        )
        logits = tl.where((columns < last)[None, :], logits, float("-inf"))
        if HAS_TARGET:
            is_wanted = columns[None, :] == wanted[:, None]
            picked += tl.sum(tl.where(is_wanted, logits, 0.0), 1)
        # NaN goes on through the sums; maxima of it are not the same everywhere.
        known = tl.where(logits == logits, logits, float("-inf"))
        higher = tl.maximum(top, tl.max(known, 1))
        shrink = tl.exp(top - higher)
        away = logits - higher[:, None]
        weights = tl.exp(away)
        spread = shrink * (spread + (top - higher) * total)
        # exp(-inf) * -inf is NaN: an impossible token adds nothing.
        spread += tl.sum(weights * tl.where(away == float("-inf"), 0.0, away), 1)
        total = shrink * total + tl.sum(weights, 1)
        top = higher
        for _ in tl.static_range(K if HAS_TOP else 0):
            found = tl.max(known, 1)
            at = tl.argmax(known, 1)
            lowest = tl.min(best, 1)
            # Of several lowest places the one of the highest id goes.
            oldest = tl.max(tl.where(best == lowest[:, None], names, -1), 1)
            goes = (best == lowest[:, None]) & (names == oldest[:, None])
            goes = goes & (found > lowest)[:, None]
            best = tl.where(goes, found[:, None], best)
            names = tl.where(goes, (start + at)[:, None], names)
            known = tl.where(tl.arange(0, BLOCK_V)[None, :] == at[:, None], float("-inf"), known)
    inside = rows < R
    N = tl.num_programs(1).to(tl.int64)
    row = split.to(tl.int64) * R + rows
    tl.store(sums + row, top, mask=inside)
    tl.store(sums + N * R + row, total, mask=inside)
    tl.store(sums + 2 * N * R + row, spread, mask=inside)
    tl.store(sums + 3 * N * R + row, picked, mask=inside)
    if HAS_TOP:
        held = row[:, None] * K + place[None, :]
        tl.store(candidates + held, best, mask=inside[:, None])
        tl.store(ids + held, names, mask=inside[:, None])


@triton.jit
def _slope(
    hidden, matrix, target, weight, lse, out, R, V, d, stride_h, stride_m, first, width,
    BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out [R, width] = weight (softmax - one-hot) over the tokens first..first+width-1."""
    rows = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    at = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    columns, inside = first + at, rows < R
    logits = _logits(
        hidden, matrix, rows, columns, R, V, d, stride_h, stride_m, BLOCK_R, BLOCK_V, BLOCK_D
    )
    scale = tl.load(weight + rows, mask=inside, other=0.0)
    norm = tl.load(lse + rows, mask=inside, other=0.0)
    wanted = tl.load(target + rows, mask=inside, other=-1).to(tl.int32)
    slope = tl.exp(logits - norm[:, None])
    slope = (slope - (columns[None, :] == wanted[:, None]).to(tl.float32)) * scale[:, None]
    held = out + rows.to(tl.int64)[:, None] * width + at[None, :]
    tl.store(held, slope.to(out.dtype.element_ty), mask=inside[:, None] & (at < width)[None, :])


def loss(
    hidden: Tensor, matrix: Tensor, target: Tensor, weight: Tensor, low: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weighted sum and the weighted nats [R]."""
    total, nats = _Loss.apply(hidden, matrix, target.contiguous(), weight.float(), low)
    return total, nats


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, matrix: Tensor, target: Tensor, weight: Tensor, low: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        lse, nats, *_ = _reads(hidden.to(low), matrix.to(low), target, 0)
        nats = nats * weight
        ctx.save_for_backward(hidden, matrix, target, weight.contiguous(), lse)
        ctx.low = low
        ctx.mark_non_differentiable(nats)
        return nats.sum(), nats

    @staticmethod
    @once_differentiable  # untyped in torch, hence:
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, matrix, target, weight, lse = ctx.saved_tensors
        for_hidden, for_matrix = ctx.needs_input_grad[:2]
        (R, d), V = hidden.shape, len(matrix)
        low_hidden, low_matrix = hidden.to(ctx.low), matrix.to(ctx.low)
        grad_hidden = torch.zeros(R, d, device=hidden.device) if for_hidden else None
        grad_matrix = torch.zeros_like(matrix) if for_matrix else None
        config = choose(hidden.device, ctx.low)
        most = min(SLICE // max(R, 1) // config.columns, GRID)
        size = max(1, most) * config.columns
        for first in range(0, V, size) if R else ():
            part = slice(first, min(first + size, V))
            slope = torch.empty(R, part.stop - first, dtype=ctx.low, device=hidden.device)
            _launch_slope(low_hidden, low_matrix, target, weight, lse, slope, first, config)
            # A slice of the matrix has all its gradient from one product over all rows.
            if grad_matrix is not None:
                grad_matrix[part] = slope.T @ low_hidden
            if grad_hidden is not None:
                grad_hidden += slope @ low_matrix[part]
        scale = grad_outputs[0]
        if grad_hidden is not None:
            grad_hidden = (grad_hidden * scale).to(hidden.dtype)
        return grad_hidden, None if grad_matrix is None else grad_matrix * scale, None, None, None


def predict(
    hidden: Tensor, matrix: Tensor, target: Tensor | None, top: int, low: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Nats [R], entropy [R], ids and probabilities of the `top` likeliest tokens [R,k]."""
    target = None if target is None else target.contiguous()
    lse, nats, entropy, values, ids = _reads(hidden.to(low), matrix.to(low), target, top)
    # By id, then, stably, by logit: of equals the first is the lowest id.
    by_id = ids.argsort(dim=1)
    order = by_id.gather(1, values.gather(1, by_id).argsort(dim=1, descending=True, stable=True))
    ids, values = (x.gather(1, order)[:, :top] for x in (ids, values))
    ids = ids.clamp(max=len(matrix) - 1).long()  # a row of NaN has found none
    return None if target is None else nats, entropy, ids, (values - lse[:, None]).exp()


def _reads(
    hidden: Tensor, matrix: Tensor, target: Tensor | None, top: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Log-sum-exp, nats (of a target) and entropy [R]; logits and ids of candidates [R,N*K].

    Without `top` there are none.
    """
    (R, d), V = hidden.shape, len(matrix)
    config = choose(hidden.device, hidden.dtype)
    splits, share = _splits(R, V, config)
    K = triton.next_power_of_2(max(1, top))
    sums = torch.empty(4, splits, R, device=hidden.device)
    held = (splits, R, K) if top else (0, R, K)
    values = torch.empty(held, device=hidden.device)
    ids = torch.empty(held, dtype=torch.int32, device=hidden.device)
    if R:
        _sweep[(triton.cdiv(R, config.rows), splits)](
            hidden, matrix, hidden if target is None else target, sums, values, ids,
            R, V, d, hidden.stride(0), matrix.stride(0), share,
            HAS_TARGET=target is not None, HAS_TOP=top > 0, K=K, **config.launch(),
        )  # fmt: skip
    tops, totals, spreads, picked = sums
    top_logit = tops.amax(0)
    away = tops - top_logit
    shrink = away.exp()
    total = (shrink * totals).sum(0)
    spread = (shrink * (spreads + away * totals)).sum(0)
    lse = top_logit + total.log()
    nats, entropy = lse - picked.sum(0), total.log() - spread / total
    values, ids = (x.transpose(0, 1).reshape(R, len(x) * K) for x in (values, ids))
    return lse, nats, entropy, values, ids


def _splits(R: int, V: int, config: Config) -> tuple[int, int]:
    """N and the tokens of a split: whole tiles, none empty. Of the sizes alone, so that results do
    not depend on the machine."""
    tiles = triton.cdiv(V, config.columns)
    wanted = min(tiles, triton.cdiv(PROGRAMS, max(1, triton.cdiv(R, config.rows))))
    share = triton.cdiv(tiles, wanted)
    return triton.cdiv(tiles, share), share * config.columns


def _launch_slope(
    hidden: Tensor,
    matrix: Tensor,
    target: Tensor,
    weight: Tensor,
    lse: Tensor,
    out: Tensor,
    first: int,
    config: Config,
) -> None:
    (R, d), width = hidden.shape, out.shape[1]
    _slope[(triton.cdiv(R, config.rows), triton.cdiv(width, config.columns))](
        hidden, matrix, target, weight, lse, out, R, len(matrix), d, hidden.stride(0),
        matrix.stride(0), first, width, **config.launch(),
    )  # fmt: skip
