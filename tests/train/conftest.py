"""Helpers of the training tests: an uninterrupted run, and one that is stopped at a step."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from abf.errors import Interrupted
from abf.train.loop import TrainResult
from abf.train.step import StepResult, Trainer
from tests.train.tiny_run import tiny_train


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Interrupted]:
    """Run `tiny_train` and send this process a signal while it does the given step."""

    def run(
        step: int, directory: Path, number: int = signal.SIGTERM, **changes: Any
    ) -> Interrupted:
        real = Trainer.step

        def with_signal(self: Trainer, at: int) -> StepResult:
            if at + 1 == step:
                os.kill(os.getpid(), number)
            return real(self, at)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "step", with_signal)
            with pytest.raises(Interrupted) as caught:
                tiny_train(directory, changes)
        return caught.value

    return run


@pytest.fixture(scope="session")
def whole_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TrainResult]:
    """An uninterrupted run with the default settings."""
    directory = tmp_path_factory.mktemp("whole")
    return directory, tiny_train(directory)
