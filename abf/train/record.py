"""What a run tells: metrics averaged since the last record, events, progress, warnings.

The averages run over the steps since the last record, and what they are made of is part of the
checkpoint: a resumed run writes the very numbers of the uninterrupted one. Only the first rank
writes. Values are nats, tokens are clean row slots.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from abf.diffusion.policy.watch import summary
from abf.model.device import CPU
from abf.track.journal import Journal
from abf.track.progress import Progress
from abf.train.lengths import shares
from abf.train.step import StepResult

JOURNAL = "journal.jsonl"


class Recorder:
    """Journal and progress of one run; a rank that is not the first keeps quiet."""

    def __init__(
        self, run_dir: Path, label: str, *, active: bool, device: torch.device = CPU
    ) -> None:
        self.label = label
        self._device = device
        self.window: dict[str, float] = {}
        """Sums over the steps since the last record."""
        self._journal = Journal(run_dir / JOURNAL) if active else None
        self._progress: Progress | None = None
        self._peak = 0.0
        self._tokens = self._flops = 0.0
        self._since = time.monotonic()

    def begin(
        self, *, step: int, steps: int, window: Mapping[str, float], peak: float = 0.0
    ) -> None:
        """Start counting at `step`; drop what an earlier attempt recorded beyond it.

        Args:
            step: steps done.
            steps: of the whole run.
            window: sums since the last record before it.
            peak: FLOPs a second of all ranks' devices together; without it no utilisation is told.
        """
        self._peak = peak
        self.window = dict(window)
        if self._journal is not None:
            self._journal.cut(step)
            self._progress = Progress(self.label, steps, unit="step", initial=step)
        self._restart()

    def step(self, result: StepResult, *, tokens: int) -> None:
        """Take in what a step of `tokens` clean tokens measured."""
        measured = {
            "steps": 1,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "masked": result.masked,
            "tokens": result.tokens,
            **{f"{name}.sum": value for name, value in result.sums.items()},
            **result.watch,
        }
        self.window = {name: self.window.get(name, 0) + value for name, value in measured.items()}
        self._tokens += tokens
        self._flops += result.flops
        if self._progress is not None:
            figures: dict[str, Any] = {"loss": result.loss, "tokens/s": f"{self.rate():.0f}"}
            self._progress.update(1, **figures)

    def rate(self) -> float:
        """Clean tokens a second since the last record."""
        return self._tokens / self._seconds()

    def clocks(self) -> dict[str, float]:
        """What depends on the machine: tokens and model FLOPs a second since the last record, MFU
        (these FLOPs as a share of the peak), and the most memory this rank's process and its GPU's
        tensors have held, 1e9 bytes."""
        flops = self._flops / self._seconds()
        found = {
            "tokens_per_s": self.rate(),
            "flops_per_s": flops,
            "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        }
        if self._device.type == "cuda":
            found["peak_gpu_memory_gb"] = torch.cuda.max_memory_allocated(self._device) / 1e9
        return found | ({"mfu": flops / self._peak} if self._peak else {})

    def _seconds(self) -> float:
        return max(time.monotonic() - self._since, 1e-9)

    def _restart(self) -> None:
        self._tokens = self._flops = 0.0
        self._since = time.monotonic()

    def metrics(
        self, *, step: int, tokens: int, wall_s: float, values: Mapping[str, float]
    ) -> None:
        """Record the averages since the last record, and `values` as they are."""
        if self._journal is not None:
            self._journal.metrics(
                step,
                tokens,
                {**averages(self.window), **values, **self.clocks()},
                wall_s,
            )
        self.window = {}
        self._restart()

    def event(self, name: str, **fields: Any) -> None:
        """Record an event."""
        if self._journal is not None:
            self._journal.event(name, **fields)

    def warn(self, name: str, text: str, **fields: Any) -> None:
        """Print a line and record it as an event."""
        if self._journal is not None:
            print(f"{self.label}: {text}", file=sys.stderr, flush=True)
            self._journal.event(name, text=text, **fields)

    def sync(self) -> None:
        """Flush the journal to disk."""
        if self._journal is not None:
            self._journal.sync()

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._progress is not None:
            self._progress.__exit__(kind, error, trace)
        if self._journal is not None:
            self._journal.close()


def averages(window: Mapping[str, float]) -> dict[str, float]:
    """Metrics of a window: loss and gradient norm a step, the terms in nats per charged token.

    `length` is divided by tokens too, not by blocks: nelbo + length is then the bound on text and
    cuts together. Heads that are watched: recall, precision, calibration over the window; blocks:
    the share of every bin of lengths.
    """
    tokens = max(window["tokens"], 1)
    values = {name: window[name] / window["steps"] for name in ("loss", "grad_norm")}
    for name in ("nelbo", "ar", "length", "edit", "complete", "distil"):
        if f"{name}.sum" in window:
            values[name] = window[f"{name}.sum"] / tokens
    if "nelbo.sum" in window:
        values["masked_share"] = window["masked"] / tokens
    return values | summary(window) | shares(window)
