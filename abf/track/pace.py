"""Where a training stands and how fast it goes, from the end of its journal; times in seconds."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECENT = 20
"""Metric records that the speed is taken over."""


@dataclass(frozen=True)
class Pace:
    """A training in progress."""

    step: int
    steps: int
    tokens_per_s: float | None
    """As last recorded; None before the first record."""
    left_s: float | None
    """Training seconds still to go at the recent speed; None before there is one."""
    silent_s: float
    """Since the last record."""


def checkpointed_step(directory: Path) -> int:
    """Step of the newest checkpoint below a training's directory, by its name; 0 before any."""
    names = [path.name for path in (directory / "ckpt").glob("step-*")]
    return max((int(name.partition("-")[2]) for name in names), default=0)


def read_pace(path: Path, *, now: float | None = None) -> Pace | None:
    """What a journal says of its training; None before it has begun.

    Only the last records are parsed: a long journal costs one read.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return None
    data = data[: data.rfind(b"\n") + 1]  # a torn last line is being written, or never will be
    begun = max(data.rfind(b'"name":"start"'), data.rfind(b'"name":"resume"'))
    if begun < 0:
        return None
    line = data[data.rfind(b"\n", 0, begun) + 1 : data.index(b"\n", begun)]
    start = json.loads(line)
    metrics: list[dict[str, Any]] = []
    end = len(data) - 1
    while end > 0 and len(metrics) < RECENT:
        first = data.rfind(b"\n", 0, end) + 1
        if data.startswith(b'{"kind":"metrics"', first):
            metrics.append(json.loads(data[first:end]))
        end = first - 1
    new, old = (metrics[0], metrics[-1]) if metrics else (None, None)
    per_step = None
    if new is not None and old is not None:
        steps = new["step"] - old["step"]
        per_step = (new["wall_s"] - old["wall_s"]) / steps if steps else new["wall_s"] / new["step"]
    step = max(start["step"], new["step"] if new else 0)
    last = max(start["time"], new["time"] if new else 0.0)
    return Pace(
        step=step,
        steps=start["steps"],
        tokens_per_s=None if new is None else new["values"].get("tokens_per_s"),
        left_s=None if per_step is None else per_step * (start["steps"] - step),
        silent_s=(time.time() if now is None else now) - last,
    )
