"""Block attention by tiles of queries: dense GEMMs over the keys a tile sees, masked at the edges.

Letters: B batch, H query heads, G kv heads, R = H/G, M queries, N keys, D head dim, T rows of a
tile, S key columns of a tile, g kv heads taken at once. Scores are in base 2 (times log2 e): exp2
is the cheaper. The maths, the bfloat16 numerics and the measurements are in README.md.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from abf_kernels.block_attention.plan import Run, Tile, plan_tiles

ROWS = 128  # queries of a tile: fewer waste less at ragged edges, more cost less per operation
SCRATCH = 1 << 19  # most elements of scores, and of key gradients, as far as one kv head allows

FAR = -1e30  # score of an invisible key, per key of distance to the ranges; finite, hence no NaN
FLOOR = -1e29  # maximum of a row that sees nothing: above FAR / 2, below any score
TINY = 1e-30  # sum of a row that sees nothing
MOST_KEYS = 1 << 23  # up to here float32 holds the middle of any range exactly


def refuse(k: Tensor) -> None:
    """Raise ValueError where this back end cannot compute what the others can."""
    if k.dtype != torch.float64 and k.shape[2] > MOST_KEYS:
        raise ValueError(
            f"k must have at most {MOST_KEYS} keys for backend tiles (or be float64); "
            f"got {k.shape[2]}"
        )


def attend(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + log mask) v without an M x N mask: [B,H,M,D], and its lse [B,H,M]."""
    # CPUs rarely multiply float16; float32 holds every one of its values.
    dtype = torch.float32 if q.dtype == torch.float16 else q.dtype
    out, lse = cast(
        "tuple[Tensor, Tensor]",
        _TiledAttention.apply(q.to(dtype), k.to(dtype), v.to(dtype), ranges, scale),
    )
    return out.to(q.dtype), lse


@dataclass(frozen=True)
class _Step:
    """One tile of one batch row and some kv heads, whose R query heads lie under one another."""

    row: int
    tile: Tile
    biases: list[Tensor]  # one [T, run] for each masked run of the tile
    kv_heads: slice
    places: slice  # of the kv heads in their group
    heads: slice
    shape: tuple[int, int, int]  # (g, R*T, S), of the scores

    def queries(self, x: Tensor) -> Tensor:
        """[B,H,M,X] -> contiguous [g,R*T,X]; oneDNN takes twice as long over strided batches."""
        part = x[self.row, self.heads, self.tile.start : self.tile.end]
        if missing := self.tile.height - part.shape[1]:
            # Zeros: the gradient of such a query is zero, and so is what it adds to its keys'.
            part = F.pad(part, (0, 0, 0, missing))
        return part.reshape(*self.shape[:2], x.shape[-1]).contiguous()

    def put(self, x: Tensor, value: Tensor) -> None:
        """Write [g,R*T,X] into x [B,H,M,X]."""
        part = x[self.row, self.heads, self.tile.start : self.tile.end]
        part.copy_(value.view(len(part), self.tile.height, -1)[:, : part.shape[1]])

    def keys(self, x: Tensor) -> Tensor:
        """[B,G,N,D] -> contiguous [g,S,D]."""
        spans = [x[self.row, self.kv_heads, start:end] for start, end in self.tile.spans]
        return spans[0].contiguous() if len(spans) == 1 else torch.cat(spans, 1)

    def add(self, x: Tensor, value: Tensor) -> None:
        """Add value [g,D,S] to the keys that it belongs to of x [heads of the group,D,N]."""
        column = 0
        for start, end in self.tile.spans:
            part = value[:, :, column : column + end - start]
            x[self.places, :, start:end] += part
            column += end - start

    def mask(self, scores: Tensor) -> None:
        """Push the scores [g,R*T,S] of invisible keys far down, in place."""
        by_head = scores.view(-1, self.tile.height, self.tile.columns)
        for run, bias in zip(self.tile.masked, self.biases, strict=True):
            by_head[:, : len(bias), run.start : run.end] += bias


class _Work:
    """What the passes share: the tile plan and, per query, the terms of the mask."""

    def __init__(self, q: Tensor, k: Tensor, ranges: Tensor) -> None:
        batch, heads, n_queries, _ = q.shape
        self.kv_heads, n_keys = k.shape[1:3]
        self.repeat = heads // self.kv_heads
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.tiles = plan_tiles(ranges, n_keys, ROWS)
        start, end = ranges.reshape(batch, n_queries, 2, 2).to(self.wide).unbind(-1)
        # Key j is visible where |j - centre| < half: exact in float32, and three times as fast as
        # integer comparisons.
        self.centre = ((start + end - 1) / 2).unsqueeze(-1)  # [B,M,2,1]
        self.half = ((end - start) / 2).unsqueeze(-1)
        self.position = torch.arange(n_keys, dtype=self.wide, device=q.device)

    def steps(self, row: int, group: range) -> Iterator[_Step]:
        """Over the tiles of a batch row, for a group of kv heads."""
        for tile in self.tiles[row]:
            if not tile.columns:
                continue
            biases = [self._bias(row, tile, run) for run in tile.masked]
            for part in _groups(group, self._head_scores(tile)):
                heads = slice(part.start * self.repeat, part.stop * self.repeat)
                shape = (len(part), self.repeat * tile.height, tile.columns)
                kv_heads, first = slice(part.start, part.stop), part.start - group.start
                places = slice(first, first + len(part))
                yield _Step(row, tile, biases, kv_heads, places, heads, shape)

    def scratch_size(self, groups: list[range]) -> int:
        """Elements of the largest score array among the steps."""
        scores = {self._head_scores(tile) for tiles in self.tiles for tile in tiles}
        sizes = (
            len(part) * size for size in scores for group in groups for part in _groups(group, size)
        )
        return max(sizes, default=0)

    def _head_scores(self, tile: Tile) -> int:
        return self.repeat * tile.height * tile.columns

    def _bias(self, row: int, tile: Tile, run: Run) -> Tensor:
        """[T, run] 0 where the key is visible, else FAR times its distance to the row's ranges."""
        keys = self.position[run.key : run.key + run.end - run.start]
        rows = slice(tile.start, tile.end)
        away = [
            (keys - self.centre[row, rows, which]).abs_().sub_(self.half[row, rows, which])
            for which in run.which
        ]
        nearest = away[0] if len(away) == 1 else torch.minimum(*away)
        return nearest.clamp_min_(0).mul_(FAR)


def _groups(heads: range, elements: int) -> list[range]:
    """As few groups of heads as hold SCRATCH each at most, of so many elements a head."""
    count = len(heads)
    parts = max(1, min(count, -(-count * elements // SCRATCH)))
    return [heads[i * count // parts : (i + 1) * count // parts] for i in range(parts)]


class _Scratch:
    """Memory for one step's scores, in the accumulator's dtype and in that of the GEMM operands.

    The latter may be shared: nobody reads it beyond the product that it was written for.
    """

    def __init__(self, size: int, work: _Work, like: Tensor, narrow: Tensor | None = None) -> None:
        self.wide = torch.empty(size, dtype=work.wide, device=like.device)
        self.is_narrow = like.dtype != work.wide
        if not self.is_narrow:
            narrow = self.wide
        self.narrow = torch.empty_like(self.wide, dtype=like.dtype) if narrow is None else narrow

    def product(
        self, step: _Step, left: Tensor, right: Tensor, alpha: float, start: Tensor | None = None
    ) -> Tensor:
        """start + alpha left right^T in the wide dtype, rounded to the operands' on the way.

        `start` [g,R*T,1] enters the GEMM's own accumulator (float32 in oneDNN), so before rounding.
        """
        narrow = self._view(self.narrow, step)
        if start is not None:
            narrow.copy_(start)
        torch.baddbmm(narrow, left, right.mT, beta=int(start is not None), alpha=alpha, out=narrow)
        return self._view(self.wide, step).copy_(narrow) if self.is_narrow else narrow

    def operand(self, step: _Step, wide: Tensor) -> Tensor:
        """The scores `wide` as a GEMM operand."""
        return self._view(self.narrow, step).copy_(wide) if self.is_narrow else wide

    @staticmethod
    def _view(flat: Tensor, step: _Step) -> Tensor:
        return flat[: math.prod(step.shape)].view(step.shape)


class _TiledAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        work = _Work(q, k, ranges)
        alpha = scale * math.log2(math.e)
        # Rows of tiles that see no key are never written: they are zero, and stay so.
        out = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
        top = torch.zeros(*q.shape[:3], 1, dtype=q.dtype, device=q.device)
        log_sum = torch.zeros(*q.shape[:3], 1, dtype=work.wide, device=q.device)
        heads = range(work.kv_heads)
        scratch = _Scratch(work.scratch_size([heads]), work, q)
        for step in itertools.chain(*(work.steps(row, heads) for row in range(len(q)))):
            qt, kt, vt = step.queries(q), step.keys(k), step.keys(v)
            scores = scratch.product(step, qt, kt, alpha)
            step.mask(scores)
            highest = scores.amax(-1, keepdim=True).clamp_min_(FLOOR).to(q.dtype)
            if scratch.is_narrow:
                # Scores rounded to bfloat16 are off by 1/256 of themselves. Subtracting the
                # maximum before that rounding leaves the largest weights nearly exact.
                scores = scratch.product(step, qt, kt, alpha, start=-highest)
                step.mask(scores)
            else:
                scores.sub_(highest)
            weights = scores.exp2_()
            total = weights.sum(-1, keepdim=True).clamp_min_(TINY)
            mean = torch.bmm(scratch.operand(step, weights), vt)
            step.put(out, mean / total)
            step.put(top, highest)
            step.put(log_sum, total.log2_())
        ctx.save_for_backward(q, k, v, out, top, log_sum)
        ctx.work, ctx.scale = work, scale
        seen = (ranges[..., 0] < ranges[..., 1]) | (ranges[..., 2] < ranges[..., 3])
        lse = (top + log_sum).squeeze(-1).mul_(math.log(2))
        lse.masked_fill_(~seen.unsqueeze(1), -math.inf)
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_out: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        with torch.autocast(grad_out.device.type, enabled=False):
            return *_gradients(ctx.work, ctx.scale, grad_out, *ctx.saved_tensors), None, None


def _gradients(
    work: _Work,
    scale: float,
    grad_out: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    top: Tensor,
    log_sum: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, from weights computed anew."""
    alpha = scale * math.log2(math.e)
    # Beside the gradients of several batch rows, the sums of one are no matter; a group of heads
    # less makes larger products, which short documents need.
    single = len(q) == 1
    groups = _groups(range(work.kv_heads), k.shape[2] * k.shape[3] if single else 0)
    delta = torch.empty_like(top)
    for row, group in itertools.product(range(len(q)), groups):
        heads = slice(group.start * work.repeat, group.stop * work.repeat)
        products = grad_out[row, heads].to(work.wide) * out[row, heads]
        delta[row, heads] = products.sum(-1, keepdim=True)
        del products
    grad_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    size = work.scratch_size(groups)
    for_weights = _Scratch(size, work, q)
    for_grads = _Scratch(size, work, q, for_weights.narrow)
    # Wide sums of one group at a time; those of all heads would be the most memory there is.
    # Keys last: x^T w is a quarter faster than w^T x in float32.
    shape = (2, max(map(len, groups)), k.shape[3], k.shape[2])
    all_sums = torch.empty(shape, dtype=work.wide, device=k.device)
    for row, group in itertools.product(range(len(q)), groups):
        sums = all_sums[:, : len(group)].zero_()
        for step in work.steps(row, group):
            qt, kt, vt = step.queries(q), step.keys(k), step.keys(v)
            grad_t = step.queries(grad_out)
            weights = for_weights.product(step, qt, kt, alpha, start=-step.queries(top))
            step.mask(weights.sub_(step.queries(log_sum)))
            weights.exp2_()
            step.add(sums[1], torch.bmm(grad_t.mT, for_weights.operand(step, weights)))

            # As with the maximum: dP - delta cancels, so most of delta goes in before the rounding.
            # The rest is taken from these very weights: `out` was rounded to q's dtype, and where
            # one key holds nearly all weight (attention sinks) that error is larger than the
            # gradient.
            grads = for_grads.product(step, grad_t, vt, 1.0, start=-step.queries(delta))
            grads.mul_(weights)
            grads.addcmul_(weights, grads.sum(-1, keepdim=True), value=-1)
            operand = for_grads.operand(step, grads)
            step.put(grad_q, torch.bmm(operand, kt).mul_(scale))
            step.add(sums[0], torch.bmm(qt.mT, operand))
        sums[0] *= scale
        for wide, grad in zip(sums, (grad_k, grad_v), strict=True):
            for source, head in zip(wide, group, strict=True):
                grad[row, head] = source.T.contiguous()  # only whole matrices transpose in blocks
    return grad_q, grad_k, grad_v
