"""Progress on long work: a bar on a terminal, a plain line every few seconds otherwise."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from tqdm import tqdm

PLAIN_SECONDS = 5.0
"""Seconds between plain lines."""


class Progress:
    """Count units of work; `figures` are shown beside the count (`loss=3.21`)."""

    def __init__(self, label: str, total: int, *, unit: str = "it", initial: int = 0) -> None:
        self.label, self.total, self.unit = label, total, unit
        self.done = self._start = initial
        self._figures: dict[str, str] = {}
        self._began = self._printed = time.monotonic()
        self._bar = (
            tqdm(total=total, initial=initial, unit=unit, desc=label, file=sys.stderr)
            if sys.stderr.isatty()
            else None
        )

    def update(self, count: int = 1, **figures: float | str) -> None:
        """Add `count` units and show `figures`."""
        self.done += count
        self._figures = {
            name: value if isinstance(value, str) else f"{value:.4g}"
            for name, value in figures.items()
        }
        if self._bar is not None:
            self._bar.set_postfix(self._figures, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._printed >= PLAIN_SECONDS:
            self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        rate = (self.done - self._start) / max(self._printed - self._began, 1e-9)
        left = (self.total - self.done) / rate if rate > 0 else 0.0
        share = 100 * self.done / max(self.total, 1)
        figures = "".join(f"  {name} {value}" for name, value in self._figures.items())
        print(
            f"{self.label}: {self.done}/{self.total} {self.unit} ({share:.0f} %)"
            f"  {rate:.3g} {self.unit}/s  {left:.0f} s left{figures}",
            file=sys.stderr,
            flush=True,
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self.done > self._start and kind is None:
            self._print()
