"""Tile sizes of block attention on this device: which are fastest, as rows for configs.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from abf_kernels.block_attention import triton as kernels
from abf_kernels.block_attention.configs import Config, Tile
from triton.runtime.errors import OutOfResources

from benchmarks.gpu.attention import ours
from benchmarks.gpu.problem import CASES, Case, Problem
from benchmarks.gpu.timing import Clock

TILES = tuple(
    Tile(rows, keys, warps, stages)
    for rows, keys, warps, stages in itertools.product(
        (32, 64, 128), (32, 64, 128), (4, 8), (2, 3, 4)
    )
)
"""What is tried for each of the three kernels, the others as they are."""


def tune(
    device: torch.device,
    clock: Clock,
    *,
    cases: tuple[Case, ...] = (CASES[2], CASES[0]),
    tiles: tuple[Tile, ...] = TILES,
    rounds: int = 7,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[str]:
    """A row of `configs.CONFIGS` for each head dim: each kernel's fastest tile.

    A kernel is timed inside a forward and backward pass, so that one that slows its neighbours (by
    the bounds it needs) does not look good.
    """
    for case in cases:
        problem = Problem(case, dtype, device)
        peer = ours(problem, "triton")

        def both(problem: Problem = problem, peer=peer) -> None:
            inputs = [x.detach().requires_grad_() for x in problem.inputs]
            torch.autograd.grad(peer.attend(*inputs), inputs, problem.grad_out)

        best: Config = kernels.config_of(problem.inputs[0])
        usual = kernels.config_of
        try:
            for part in Config._fields:
                found: dict[Tile, float] = {}
                for tile in (getattr(best, part), *tiles):
                    tried = best._replace(**{part: tile})
                    kernels.config_of = lambda q, tried=tried: tried
                    try:
                        both()
                        found[tile] = sorted(clock(both) for _ in range(rounds))[rounds // 2]
                    except OutOfResources:
                        continue  # does not fit this device's shared memory
                fastest = min(found, key=lambda tile: found[tile])
                gain = found[getattr(best, part)] / found[fastest]
                best = best._replace(**{part: fastest})
                yield f"{part}, {case}: {fastest}, {gain:.3f}x the one in use"
        finally:
            kernels.config_of = usual
        yield f"(ARCHITECTURE, {case.shape.dim}, {problem.inputs[0].element_size()}): {best},"
