"""What a rank's device could do at best, for the model FLOPs utilisation (MFU) of a training."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch

SIDE = 1024
"""Rows and columns of the matrices that are multiplied."""
SECONDS = 0.1
"""How long products are tried; the fastest counts."""


@dataclass(frozen=True)
class Peak:
    """FLOPs a second of one rank's device."""

    flops: float
    source: str
    """Where the number comes from."""


def peak(precision: str, *, given_tflops: float | None = None) -> Peak:
    """The peak that was given, or one measured here with the threads that torch is set to.

    Args:
        precision: `fp32` or `bf16`, of the training.
        given_tflops: 1e12 FLOPs a second; none measures.
    """
    if given_tflops is not None:
        return Peak(given_tflops * 1e12, f"given: launch.peak_tflops={given_tflops}")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
    one, other = torch.ones(2, SIDE, SIDE, dtype=dtype)
    found = torch.empty(SIDE, SIDE, dtype=dtype)
    torch.matmul(one, other, out=found)  # the first compiles, and touches memory
    best, began = float("inf"), time.perf_counter()
    while (before := time.perf_counter()) - began < SECONDS:
        torch.matmul(one, other, out=found)
        best = min(best, time.perf_counter() - before)
    threads = torch.get_num_threads()
    said = f"measured: {SIDE} x {SIDE} matrix product, {precision}, {threads} thread(s)"
    return Peak(2 * SIDE**3 / best, said)
