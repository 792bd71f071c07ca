"""Problems of block attention on a device: inputs, blocks, and what is counted of them.

Letters: B batch, H query heads, G kv heads, N = 2L rows of both streams, D head dim.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from abf_kernels.block_attention.metadata import two_stream_ranges
from torch import Tensor

from benchmarks.bench_attention import Shape, draw_ids

FORWARD, BACKWARD = 4, 10
"""FLOPs of a seen pair, over D."""


@dataclass(frozen=True)
class Case:
    """One problem, and what it should reach."""

    shape: Shape
    """Its length is 2L."""
    groups: int
    """G."""
    goals: dict[str, dict[str, str]]
    """By device ("H200", "A100"), by figure."""

    def __str__(self) -> str:
        return f"{self.shape} G={self.groups}"


CASES = (
    Case(
        Shape(4, 16, 8192, 128), 16,
        {"H200": {"forward": ">= 360", "backward": ">= 280", "over Flex forward": ">= 1.25",
                  "over Flex backward": ">= 1.3"},
         "A100": {"forward": ">= 150", "backward": ">= 120"}},
    ),
    Case(Shape(16, 16, 2048, 128), 16, {"H200": {"over Flex forward+backward": ">= 1.6"}}),
    Case(Shape(4, 16, 8192, 64), 16, {"H200": {"forward": ">= 340", "backward": ">= 250"}}),
    Case(Shape(4, 32, 8192, 128), 8, {}),
)  # fmt: skip


class Problem:
    """Inputs on the device; `renew` draws other blocks, whose masks are made outside the clock."""

    def __init__(self, case: Case, dtype: torch.dtype, device: torch.device) -> None:
        shape = case.shape
        batch, heads, length, dim = shape.batch, shape.heads, shape.length, shape.dim
        self.case, self.device = case, device

        def normal(n_heads: int) -> Tensor:
            return torch.randn(batch, n_heads, length, dim, device=device).to(dtype)

        self.inputs = (normal(heads), normal(case.groups), normal(case.groups))
        self.grad_out = normal(heads)
        self.gqa = heads != case.groups
        # Captured by the mask function, and written to: another function would be compiled again.
        self.block = torch.zeros(batch, length, dtype=torch.int32, device=device)
        self.clean = torch.arange(length, device=device) >= length // 2
        self.renew(0)

    def renew(self, seed: int) -> None:
        """Draw blocks of a mean of 24 tokens, one document a row."""
        self.ids = tuple(x.to(self.device) for x in draw_ids(self.case.shape, seed))
        self.block.copy_(self.ids[1].repeat(1, 2))
        self.ranges = two_stream_ranges(*self.ids, clean_stream="context_causal")
        starts_ends = self.ranges.long().sum((0, 1))
        self.pairs = int(starts_ends[1] - starts_ends[0] + starts_ends[3] - starts_ends[2])

    def flops(self, per_pair: int) -> int:
        """Of a pass over the pairs seen."""
        return per_pair * self.case.shape.dim * self.case.shape.heads * self.pairs

    def density(self) -> float:
        """Share of N x N pairs that are seen."""
        return self.pairs / self.case.shape.batch / self.case.shape.length**2


def mask_of(problem: Problem) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The two-stream mask as FlexAttention wants it: batch, head, query, key -> seen."""
    block, clean = problem.block, problem.clean

    def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        of_q, of_k = block[b, q], block[b, k]
        own = ~clean[q] & ~clean[k] & (of_q == of_k)
        before = ~clean[q] & clean[k] & (of_k < of_q)
        return own | before | (clean[q] & clean[k] & (k <= q))

    return sees


def tile_waste(problem: Problem) -> float:
    """Pairs that our forward tiles compute, per pair seen."""
    from abf_kernels.block_attention.triton import config_of
    from abf_kernels.block_attention.triton_plan import DevicePlan

    rows, keys, *_ = config_of(problem.inputs[0]).forward
    bounds = DevicePlan(problem.ranges, problem.case.shape.length).bounds(rows).long()
    spans = torch.stack((bounds[..., 3] - bounds[..., 0], bounds[..., 7] - bounds[..., 4]))
    return int((-(-spans // keys)).sum()) * rows * keys / problem.pairs
