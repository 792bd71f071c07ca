"""Real processes, really killed: the same command again ends in the very same run."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from abf.track.journal import read_journal
from tests.train import tiny_run
from tests.train.equality import assert_same_run, curve, events
from tests.train.tiny_run import L, tiny_train, write_rows

STEPS = 160
CHANGES = {"tokens": STEPS * 4 * L, "checkpoint_steps": 10, "log_steps": 3}
"""Records and checkpoints fall on different steps, so a resume goes on inside an average."""


def start(directory: Path) -> subprocess.Popen[str]:
    command = [sys.executable, tiny_run.__file__, str(directory), json.dumps(CHANGES)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def newest(directory: Path) -> int:
    """Step of the newest checkpoint, 0 without one."""
    names = [path.name for path in (directory / "ckpt").glob("step-*")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


def when(process: subprocess.Popen[str], condition: Callable[[], bool], number: int) -> str:
    """Send a signal as soon as the condition holds; returns what the process said on stderr."""
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "the condition never came"
        time.sleep(0.001)
    process.send_signal(number)
    return process.communicate(timeout=120)[1]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("uninterrupted")
    tiny_train(directory, CHANGES)
    return directory


def test_kill_9_and_the_same_command_again(tmp_path: Path, uninterrupted: Path) -> None:
    write_rows(tmp_path)
    for kill in range(2):
        process = start(tmp_path)
        before = newest(tmp_path)
        when(process, lambda before=before: newest(tmp_path) > before + 10, signal.SIGKILL)
        assert process.returncode == -signal.SIGKILL
        assert 0 < newest(tmp_path) < STEPS, kill
    process = start(tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert f"done: {STEPS} steps" in out
    assert events(tmp_path).count("resume") == 2
    assert_same_run(uninterrupted, tmp_path)
    steps = [step for step, _, _ in curve(tmp_path)]
    assert steps == [*range(3, STEPS, 3), STEPS]  # nothing twice, nothing missing
    records = read_journal(tmp_path / "journal.jsonl")
    wall = [record["wall_s"] for record in records if record["kind"] == "metrics"]
    assert wall == sorted(wall)


def test_each_signal_saves_and_exits_with_75(tmp_path: Path, uninterrupted: Path) -> None:
    write_rows(tmp_path)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        process = start(tmp_path)
        before = newest(tmp_path)
        told = when(process, lambda before=before: newest(tmp_path) > before, number)
        assert process.returncode == 75, told
        assert f"{number.name}: finishing this step" in told
        step = newest(tmp_path)
        assert before < step < STEPS
        assert f"tiny: stopped by {number.name} after step {step} of {STEPS}" in told
        assert f"goes on from there: {sys.executable}" in told
        assert tiny_run.__file__ in told
    assert tiny_train(tmp_path, CHANGES).steps == STEPS
    assert_same_run(uninterrupted, tmp_path)
    assert events(tmp_path).count("interrupted") == 3
