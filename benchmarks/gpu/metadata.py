"""What a new segmentation costs besides attention: bounds of tiles, and compilations.

Letters: L tokens of a row; N = 2L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from abf_kernels.block_attention.api import block_attention
from abf_kernels.block_attention.triton_plan import DevicePlan
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention
from triton import knobs

from benchmarks.gpu.attention import Peer, ours
from benchmarks.gpu.problem import FORWARD, Case, Problem
from benchmarks.gpu.timing import Clock, Figure, figure, interleaved


def bounds(
    case: Case, device: torch.device, clock: Clock, *, rows: int, rounds: int
) -> Iterator[Figure]:
    """Microseconds of the kernel that finds what tiles of `rows` queries have to look at."""
    problem = Problem(case, torch.bfloat16, device)
    seconds = interleaved(
        {"bounds": lambda: DevicePlan(problem.ranges, case.shape.length).bounds(rows)},
        clock, rounds=rounds, renew=problem.renew,
    )["bounds"]  # fmt: skip
    name = f"mask metadata: bounds of tiles of {rows}, {case}"
    yield figure(name, [1e6 * s for s in seconds], "us", goal="<= 50")


@contextmanager
def compilations() -> Iterator[Callable[[], int]]:
    """Counts kernels that Triton makes, its disk cache's included."""
    seen: list[Any] = []
    before = knobs.compilation.listener
    knobs.compilation.listener = lambda **what: seen.append(what)
    try:
        yield lambda: len(seen)
    finally:
        knobs.compilation.listener = before


def recompilations(
    case: Case,
    device: torch.device,
    *,
    segmentations: int = 100,
    dtype: torch.dtype = torch.bfloat16,
) -> Figure:
    """Kernels compiled over so many segmentations after the first, forward and backward."""
    problem = Problem(case, dtype, device)
    peer: Peer = ours(problem, "triton")

    def both() -> None:
        inputs = [x.detach().requires_grad_() for x in problem.inputs]
        torch.autograd.grad(peer.attend(*inputs), inputs, problem.grad_out)

    both()
    with compilations() as count:
        for seed in range(1, segmentations + 1):
            problem.renew(seed)
            both()
        found = count()
    name = f"kernels compiled over {segmentations} segmentations, {case}"
    return Figure(name, found, found, found, "kernels", goal="0")


def causal(case: Case, device: torch.device, clock: Clock, *, rounds: int) -> Iterator[Figure]:
    """The exact-FLOP limit: FlashAttention, causal, over L, twice; ours given causal ranges."""
    shape = case.shape
    length = shape.length // 2
    q, k, v = (
        torch.randn(2 * shape.batch, heads, length, shape.dim, device=device).bfloat16()
        for heads in (shape.heads, case.groups, case.groups)
    )
    position = torch.arange(length, dtype=torch.int32, device=device)
    nothing = torch.zeros_like(position)
    ranges = torch.stack((nothing, position + 1, nothing, nothing), -1)
    ranges = ranges.expand(len(q), -1, -1).contiguous()

    def flash() -> object:
        with torch.no_grad(), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=shape.heads != case.groups
            )

    def tiles() -> object:
        with torch.no_grad():
            return block_attention(q, k, v, ranges, backend="triton")

    seconds = interleaved({"FlashAttention": flash, "ours": tiles}, clock, rounds=rounds)
    work = FORWARD * shape.dim * shape.heads * len(q) * length * (length + 1) // 2
    for name, series in seconds.items():
        rates = [work / s / 1e12 for s in series]
        yield figure(f"forward, {name}, causal over L twice, {case}", rates, "TFLOP/s")
