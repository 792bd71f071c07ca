"""A rank that dies, hangs or fails: the others end within a bounded time and name it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from abf.data.loader import row_indices
from abf.errors import DivergenceError, RankError
from abf.train import checkpoint
from tests.train.tiny_run import tiny_train, write_rows

TIMEOUT_S = 6.0
HOST = socket.gethostname()


def run(
    directory: Path, fault: str, sharding: str, *, rank: int = 1
) -> list[tuple[int | None, str]]:
    """Exit code and errors of both ranks; None for one that had to be ended."""
    write_rows(directory)
    # The checkpoint of step 4 may be on its way when step 5 meets the fault; that of step 2 stands.
    parallel = {"sharding": sharding, "timeout_s": TIMEOUT_S}
    changes = {"checkpoint_steps": 2, "parallel": parallel}
    command = [sys.executable, "-m", "tests.train.faulty_run", str(directory)]
    processes = [
        subprocess.Popen(
            [*command, json.dumps(changes), fault, str(rank)],
            env=os.environ
            | {"RANK": str(number), "WORLD_SIZE": "2"}
            | {"ABF_RENDEZVOUS": str(directory / "meeting.json"), "OMP_NUM_THREADS": "1"},
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in (0, 1)
    ]
    ended: list[tuple[int | None, str]] = [(None, ""), (None, "")]
    try:
        well = 1 - rank
        ended[well] = (None, processes[well].communicate(timeout=90)[1])
        ended[well] = (processes[well].returncode, ended[well][1])
        if fault not in ("freeze", "hang"):
            ended[rank] = (None, processes[rank].communicate(timeout=30)[1])
            ended[rank] = (processes[rank].returncode, ended[rank][1])
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ended


def last_step(directory: Path) -> int:
    found, damaged = checkpoint.latest(directory)
    assert found is not None
    assert damaged == []
    return found.step


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_a_killed_rank_is_named_and_the_last_checkpoint_stands(
    tmp_path: Path, sharding: str
) -> None:
    (code, told), (killed, _) = run(tmp_path, "kill", sharding)
    assert killed == -signal.SIGKILL
    assert code == RankError.exit_code, told
    assert f"rank 1 on {HOST} gave no sign of life for 3 s" in told
    assert "Rank 0 of 2 stopped with it; the last checkpoint stands" in told
    assert last_step(tmp_path) in (2, 4)
    assert tiny_train(tmp_path).steps == 10  # one process goes on from there
    assert "resume" in (tmp_path / "journal.jsonl").read_text()


def test_the_killed_rank_may_be_the_first(tmp_path: Path) -> None:
    """It kept the store in which the others would read."""
    (killed, _), (code, told) = run(tmp_path, "kill", "full", rank=0)
    assert killed == -signal.SIGKILL
    assert code == RankError.exit_code, told
    assert "rank 0" in told
    assert "is gone" in told
    assert last_step(tmp_path) in (2, 4)


@pytest.mark.parametrize(("fault", "sharding"), [("hang", "full"), ("freeze", "none")])
def test_a_rank_that_hangs_is_named_with_its_place(
    tmp_path: Path, fault: str, sharding: str
) -> None:
    (code, told), _ = run(tmp_path, fault, sharding)
    assert code == RankError.exit_code, told
    if fault == "hang":
        assert f"rank 1 on {HOST} hangs, or takes too long, in " in told
        assert "faulty_run.py:" in told
        assert "(fail_here)" in told
    else:
        assert f"rank 1 on {HOST} gave no sign of life for 3 s" in told
    assert last_step(tmp_path) in (2, 4)


@pytest.mark.parametrize(
    ("fault", "words"),
    [("bug", "RuntimeError: shapes do not fit"), ("file", "train.arrow went away")],
)
def test_the_last_words_of_a_rank_are_passed_on(tmp_path: Path, fault: str, words: str) -> None:
    (code, told), (other, own) = run(tmp_path, fault, "full")
    assert code == RankError.exit_code, told
    assert f"rank 1 on {HOST} ended: {words}" in told
    assert other == 1
    assert words in own


@pytest.mark.parametrize("sharding", ["none", "full"])
def test_no_number_on_one_rank_stops_both_and_is_named(tmp_path: Path, sharding: str) -> None:
    ended: list[Any] = run(tmp_path, "nan", sharding)
    rows, _ = row_indices(4, batch_rows=4, n_rows=12, seed=0)
    for code, told in ended:
        assert code == DivergenceError.exit_code, told
        assert "step 5 of 10: loss nan" in told
        assert f"(length is nan on rank 1 of 2 ({HOST}))" in told
        assert f"Batch: rows {', '.join(map(str, rows[2:].tolist()))} of" in told
    assert last_step(tmp_path) in (2, 4)
