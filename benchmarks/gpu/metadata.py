"""What a new segmentation costs besides attention: bounds of tiles, and compilations.

Letters: L tokens of a row; N = 2L.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch._dynamo
from abf_kernels.block_attention.triton import config_of
from abf_kernels.block_attention.triton_plan import DevicePlan
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch._dynamo.utils import counters
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from triton import knobs

from benchmarks.gpu.attention import Peer, ours
from benchmarks.gpu.problem import Case, Problem, mask_of
from benchmarks.gpu.timing import Clock, Figure, figure, interleaved


def bounds(
    case: Case,
    device: torch.device,
    clock: Clock,
    *,
    rounds: int,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Figure]:
    """Microseconds of all that forward and backward need to know of new ranges."""
    problem = Problem(case, dtype, device)
    config = config_of(problem.inputs[0])

    def step() -> None:
        plan = DevicePlan(problem.ranges, case.shape.length)
        plan.bounds(config.forward.rows)
        plan.bounds(config.dq.rows)
        plan.touching(config.dkv.rows, config.dkv.keys)

    seconds = interleaved({"step": step}, clock, rounds=rounds, renew=problem.renew)["step"]
    name = f"mask metadata: bounds and lists of a step, {case}"
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


def flex_recompilations(
    case: Case, device: torch.device, *, segmentations: int = 100, compiler: str = "inductor"
) -> Iterator[Figure]:
    """Graphs that Dynamo compiles of Flex, forward, for masks as a training loop makes them.

    A mask function of each batch's own ids, its lengths always the same. Where Dynamo's limit is
    met (8; it would run on without compiling) the count ends, and the detail says so.
    """
    torch._dynamo.reset()
    problem = Problem(case, torch.bfloat16, device)
    batch, length = case.shape.batch, case.shape.length
    attention: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True, backend=compiler)
    found, detail = 0, f"forward, over {segmentations} segmentations"
    for seed in range(segmentations + 1):
        problem.renew(seed)
        problem.block = problem.block.clone()
        mask = create_block_mask(mask_of(problem), batch, None, length, length, device=device)
        before = counters["stats"]["unique_graphs"]
        try:
            with torch.no_grad():
                attention(*problem.inputs, block_mask=mask, enable_gqa=problem.gqa)
        except FailOnRecompileLimitHit:
            detail = f"Dynamo's limit was met at segmentation {seed}"
            break
        found += (counters["stats"]["unique_graphs"] - before) * (seed > 0)
    name = f"graphs compiled over {segmentations} segmentations, Flex, {case}"
    yield Figure(name, found, found, found, "graphs", detail=detail)


def run(case: Case, device: torch.device, clock: Clock, *, rounds: int) -> Iterator[Figure]:
    """Bounds, and compilations of ours."""
    yield from bounds(case, device, clock, rounds=rounds)
    yield recompilations(case, device)
