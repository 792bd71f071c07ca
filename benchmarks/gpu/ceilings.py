"""What this device does at most: a large matrix product, and a large copy."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.gpu.timing import Clock, Figure, figure, interleaved


def copy_seconds(size: int, device: torch.device, clock: Clock, rounds: int) -> list[float]:
    """Seconds of copying `size` bytes: twice as many are moved."""
    source = torch.ones(size, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return interleaved({"copy": lambda: target.copy_(source)}, clock, rounds=rounds)["copy"]


def run(device: torch.device, clock: Clock, *, n: int, size: int, rounds: int) -> Iterator[Figure]:
    """TFLOP/s of an n x n x n product of random bfloat16 numbers; GB/s of a copy, read and write.

    Args:
        n: side of the matrices.
        size: bytes copied.
        rounds: of each.
    """
    a, b = (torch.randn(n, n, device=device).bfloat16() for _ in range(2))
    seconds = interleaved({"product": lambda: a @ b}, clock, rounds=rounds)["product"]
    rates = [2 * n**3 / s / 1e12 for s in seconds]
    yield figure(f"ceiling: matrix product {n}^3, bf16", rates, "TFLOP/s")
    rates = [2 * size / s / 1e9 for s in copy_seconds(size, device, clock, rounds)]
    yield figure(f"ceiling: copy of {size / 2**30:.3g} GiB, read and written", rates, "GB/s")
