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

from abf_kernels.block_attention.plan import Island, Run, Tile, islands, plan_tiles
from abf_kernels.block_attention.scratch import Scratch, Sums, groups

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

    def steps(self, row: int, tiles: list[Tile], group: range) -> Iterator[_Step]:
        """Over tiles of a batch row, for a group of kv heads."""
        for tile in tiles:
            if not tile.columns:
                continue
            biases = [self._bias(row, tile, run) for run in tile.masked]
            for part in groups(group, self._head_scores(tile), SCRATCH):
                heads = slice(part.start * self.repeat, part.stop * self.repeat)
                shape = (len(part), self.repeat * tile.height, tile.columns)
                kv_heads, first = slice(part.start, part.stop), part.start - group.start
                places = slice(first, first + len(part))
                yield _Step(row, tile, biases, kv_heads, places, heads, shape)

    def scratch_size(self, among: set[range]) -> int:
        """Elements of the largest score array among the steps, for these groups of kv heads."""
        scores = {self._head_scores(tile) for tiles in self.tiles for tile in tiles}
        return max(
            (
                len(part) * size
                for size in scores
                for group in among
                for part in groups(group, size, SCRATCH)
            ),
            default=0,
        )

    def parts(self, row: int, dim: int) -> Iterator[tuple[range, Island]]:
        """Over groups of kv heads and islands of a batch row: both as large as SCRATCH allows."""
        heads = range(self.kv_heads)
        for island in islands(self.tiles[row], SCRATCH // (dim * len(heads))):
            for group in groups(heads, island.size * dim, SCRATCH):
                yield group, island

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
        scratch = Scratch(work.scratch_size({heads}), work.wide, q)
        for step in itertools.chain(
            *(work.steps(row, tiles, heads) for row, tiles in enumerate(work.tiles))
        ):
            qt, kt, vt = step.queries(q), step.keys(k), step.keys(v)
            scores = scratch.product(qt, kt, alpha)
            step.mask(scores)
            highest = scores.amax(-1, keepdim=True).clamp_min_(FLOOR).to(q.dtype)
            if scratch.is_narrow:
                # Scores rounded to bfloat16 are off by 1/256 of themselves. Subtracting the
                # maximum before that rounding leaves the largest weights nearly exact.
                scores = scratch.product(qt, kt, alpha, start=-highest)
                step.mask(scores)
            else:
                scores.sub_(highest)
            weights = scores.exp2_()
            total = weights.sum(-1, keepdim=True).clamp_min_(TINY)
            mean = torch.bmm(scratch.operand(weights), vt)
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
    delta = torch.empty_like(top)
    head_groups = groups(range(q.shape[1]), q.shape[2] * q.shape[3], SCRATCH)
    for row, group in itertools.product(range(len(q)), head_groups):
        heads = slice(group.start, group.stop)
        products = grad_out[row, heads].to(work.wide) * out[row, heads]
        delta[row, heads] = products.sum(-1, keepdim=True)
        del products
    grad_q = torch.zeros(q.shape, dtype=q.dtype, device=q.device)
    grad_k, grad_v = (torch.zeros(x.shape, dtype=x.dtype, device=x.device) for x in (k, v))
    dim = k.shape[3]
    parts = [(row, *part) for row in range(len(q)) for part in work.parts(row, dim)]
    size = work.scratch_size({group for _, group, _ in parts})
    for_weights = Scratch(size, work.wide, q)
    for_grads = Scratch(size, work.wide, q, for_weights.narrow)
    # Wide sums of one part at a time; those of all would be the most memory there is.
    most = max((len(group) * island.size for _, group, island in parts), default=0)
    memory = torch.empty(2 * most * dim, dtype=work.wide, device=k.device)
    for row, group, island in parts:
        sums = Sums(memory, island, len(group), dim)
        for step in work.steps(row, island.tiles, group):
            qt, kt, vt = step.queries(q), step.keys(k), step.keys(v)
            grad_t = step.queries(grad_out)
            weights = for_weights.product(qt, kt, alpha, start=-step.queries(top))
            step.mask(weights.sub_(step.queries(log_sum)))
            weights.exp2_()
            sums.add(
                1, step.tile.seen, step.places, torch.bmm(grad_t.mT, for_weights.operand(weights))
            )

            # As with the maximum: dP - delta cancels, so most of delta goes in before the rounding.
            # The rest is taken from these very weights: `out` was rounded to q's dtype, and where
            # one key holds nearly all weight (attention sinks) that error is larger than the
            # gradient.
            grads = for_grads.product(grad_t, vt, 1.0, start=-step.queries(delta))
            grads.mul_(weights)
            grads.addcmul_(weights, grads.sum(-1, keepdim=True), value=-1)
            operand = for_grads.operand(grads)
            step.put(grad_q, torch.bmm(operand, kt).mul_(scale))
            sums.add(0, step.tile.seen, step.places, torch.bmm(qt.mT, operand))
        sums.put(0, grad_k[row], group, scale)
        sums.put(1, grad_v[row], group, 1.0)
    return grad_q, grad_k, grad_v
