"""Memory that the steps of the `tiles` back end share: scores of one tile, sums of one island.

Letters: D head dim, T rows of a tile and its query heads, S key columns of a tile, g kv heads taken
at once, N keys.
"""

from __future__ import annotations

import bisect
import math

import torch
from torch import Tensor

from abf_kernels.block_attention.plan import Island


def groups(heads: range, elements: int, most: int) -> list[range]:
    """As few groups of heads as hold `most` elements each at most, of so many elements a head."""
    count = len(heads)
    parts = max(1, min(count, -(-count * elements // most)))
    return [heads[i * count // parts : (i + 1) * count // parts] for i in range(parts)]


class Scratch:
    """Memory for one step's scores, in the accumulator's dtype and in that of the GEMM operands.

    The latter may be shared: nobody reads it beyond the product that it was written for.
    """

    def __init__(
        self, size: int, wide: torch.dtype, like: Tensor, narrow: Tensor | None = None
    ) -> None:
        self.wide = torch.empty(size, dtype=wide, device=like.device)
        self.is_narrow = like.dtype != wide
        if not self.is_narrow:
            narrow = self.wide
        self.narrow = torch.empty_like(self.wide, dtype=like.dtype) if narrow is None else narrow

    def product(
        self, left: Tensor, right: Tensor, alpha: float, start: Tensor | None = None
    ) -> Tensor:
        """start + alpha left right^T, [g,T,D] and [g,S,D] -> [g,T,S] in the wide dtype.

        Rounded to the operands' on the way; `start` [g,T,1] enters the GEMM's own accumulator
        (float32 in oneDNN), so before rounding.
        """
        shape = (*left.shape[:2], right.shape[1])
        narrow = _view(self.narrow, shape)
        if start is not None:
            narrow.copy_(start)
        torch.baddbmm(narrow, left, right.mT, beta=int(start is not None), alpha=alpha, out=narrow)
        return _view(self.wide, shape).copy_(narrow) if self.is_narrow else narrow

    def operand(self, wide: Tensor) -> Tensor:
        """The scores `wide` as a GEMM operand."""
        return _view(self.narrow, wide.shape).copy_(wide) if self.is_narrow else wide


class Sums:
    """Gradients of an island's k (0) and v (1) for a group of kv heads, in the accumulator's dtype.

    Keys last: x^T w is a quarter faster than w^T x in float32.
    """

    def __init__(self, memory: Tensor, island: Island, heads: int, dim: int) -> None:
        self.keys = island.keys
        self.parts: list[Tensor] = []  # [2,g,D,keys] of each stretch of keys
        for start, end in island.keys:
            shape = (2, heads, dim, end - start)
            self.parts.append(_view(memory, shape).zero_())
            memory = memory[math.prod(shape) :]

    def add(
        self, which: int, seen: list[tuple[int, int, int]], heads: slice, value: Tensor
    ) -> None:
        """Add value [heads,D,S] of a tile that has seen these to the sums of their keys."""
        for start, end, column in seen:
            number = bisect.bisect(self.keys, (start, math.inf)) - 1
            keys = slice(start - self.keys[number][0], end - self.keys[number][0])
            self.parts[number][which, heads, :, keys] += value[..., column : column + end - start]

    def put(self, which: int, grad: Tensor, group: range, scale: float) -> None:
        """Write the sums times `scale` into grad [G,N,D]."""
        for (start, end), part in zip(self.keys, self.parts, strict=True):
            for source, head in zip(part[which].mul_(scale), group, strict=True):
                # Only whole matrices transpose in blocks.
                grad[head, start:end] = source.T.contiguous()


def _view(flat: Tensor, shape: tuple[int, ...]) -> Tensor:
    return flat[: math.prod(shape)].view(shape)
