"""Asked to stop: a signal becomes a flag that the loop reads between two steps.

Slurm sends SIGUSR2 before the time limit (SIGUSR1 by hand; NCCL may take that one) and SIGTERM at
cancellation, a person sends SIGINT by Ctrl-C. The step in progress is finished, a checkpoint
written, and the process exits with 75.
"""

from __future__ import annotations

import os
import shlex
import signal
import sys
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
TIME_IS_UP = (signal.SIGUSR1, signal.SIGUSR2)
"""Those after which the job should go back into the queue."""


class StopFlag:
    """Context that catches the signals and restores their handlers; main thread only."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        """The first signal that arrived, or None."""
        self._before: dict[signal.Signals, Any] = {}

    @property
    def name(self) -> str:
        """The signal's name for messages; empty when none arrived here."""
        return "" if self.signal is None else self.signal.name

    @property
    def time_is_up(self) -> bool:
        """The time limit is near: there is more to do, in another job."""
        return self.signal in TIME_IS_UP

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.signal == signal.SIGINT:
            # The second Ctrl-C: do not wait for the step. Files are written whole or not at all,
            # so nothing is lost beyond the last checkpoint.
            raise KeyboardInterrupt
        if self.signal is None:
            self.signal = signal.Signals(number)
            # One unbuffered write: a handler may run in the middle of a buffered one.
            os.write(2, f"\n{self.name}: finishing this step, then saving\n".encode())

    def __enter__(self) -> StopFlag:
        for number in SIGNALS:
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def command() -> str:
    """The command line of this process, ready to paste."""
    return shlex.join(sys.orig_argv)
