"""Clocks, interleaved rounds, and the rows of the GPU table."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

Call = Callable[[], object]
FLUSHED = 512 << 20
"""Bytes written before each timed call: more than any cache."""
LEAD = 2_000_000
"""Cycles for which the device then waits, about a millisecond: the host gets its launches ready,
and what is timed is the device, not Python or the guards of a compiled peer."""


class Clock(Protocol):
    """Seconds that the device needs for a call."""

    def __call__(self, call: Call) -> float: ...


class CudaClock:
    """By CUDA events, with the caches overwritten beforehand."""

    def __init__(self, device: torch.device) -> None:
        self.scratch = torch.empty(FLUSHED, dtype=torch.int8, device=device)

    def __call__(self, call: Call) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.scratch.zero_()
        torch.cuda._sleep(LEAD)
        begin.record()
        call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def cpu_clock(call: Call) -> float:
    """CPU time of the process: for tests of this script where there is no GPU."""
    began = time.process_time()
    call()
    return max(time.process_time() - began, 1e-9)


@dataclass(frozen=True)
class Figure:
    """A row of the table; low and high bound a 95 % bootstrap interval of the median."""

    figure: str
    value: float
    low: float
    high: float
    unit: str
    goal: str = ""
    """Of issue and notes, in the same unit; empty where there is none."""
    detail: str = ""
    density: float | None = None
    """Share of query-key pairs that are seen."""
    waste: float | None = None
    """Pairs computed by our forward tiles per pair seen."""

    def __str__(self) -> str:
        shown = f"{self.value:10.4g} [{self.low:.4g}, {self.high:.4g}] {self.unit}"
        goal = f"goal {self.goal}" if self.goal else ""
        return f"{self.figure:<72} {shown:<44} {goal:<12} {self.detail}"


def figure(name: str, values: Sequence[float], unit: str, **more: object) -> Figure:
    """The median of values, and its interval."""
    found = np.asarray(values, dtype=np.float64)
    picks = np.random.default_rng(0).integers(len(found), size=(2000, len(found)))
    low, high = np.quantile(np.median(found[picks], axis=1), [0.025, 0.975])
    return Figure(name, float(np.median(found)), float(low), float(high), unit, **more)  # pyright: ignore[reportArgumentType]


def ratio(name: str, peer: Sequence[float], ours: Sequence[float], **more: object) -> Figure:
    """Median of the peer's seconds over the median of ours; rounds are resampled together."""
    a, b = np.asarray(peer), np.asarray(ours)
    picks = np.random.default_rng(0).integers(len(a), size=(2000, len(a)))
    low, high = np.quantile(
        np.median(a[picks], axis=1) / np.median(b[picks], axis=1), [0.025, 0.975]
    )
    value = float(np.median(a) / np.median(b))
    return Figure(name, value, float(low), float(high), "ratio", **more)  # pyright: ignore[reportArgumentType]


def interleaved(
    variants: Mapping[str, Call],
    clock: Clock,
    *,
    rounds: int,
    warm: int = 3,
    renew: Callable[[int], object] | None = None,
) -> dict[str, list[float]]:
    """Seconds of each variant in each round; all of a round meet the same inputs.

    Args:
        variants: calls that wait for nothing.
        clock: of the device.
        rounds: timed ones.
        warm: rounds before these, not counted.
        renew: draws the inputs of a round, by its number.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(-warm, rounds):
        if renew is not None:
            renew(number + warm)
        for name, call in variants.items():
            taken = clock(call)
            if number >= 0:
                seconds[name].append(taken)
    return seconds
