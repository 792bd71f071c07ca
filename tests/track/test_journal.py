"""The journal survives a kill at any byte, and a cut leaves no replayed step behind."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from abf.artifacts import METRICS
from abf.errors import ArtifactError
from abf.track.journal import Journal, metrics_table, read_journal


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_journal(path) if record["kind"] == "metrics"]


def write_steps(path: Path, *numbers: int) -> None:
    with Journal(path) as journal:
        for number in numbers:
            journal.metrics(number, number * 64, {"loss": 1 / number, "lr": 0.1}, number * 0.5)


def test_records_come_back_as_written(tmp_path: Path) -> None:
    path = tmp_path / "run" / "journal.jsonl"
    with Journal(path) as journal:
        journal.event("start", steps=3, note="größe\n2")
        journal.metrics(1, 64, {"loss": 0.1 + 0.2}, 0.5)
        journal.sync()
    start, metrics = read_journal(path)
    assert (start["kind"], start["name"], start["steps"], start["note"]) == (
        "event",
        "start",
        3,
        "größe\n2",
    )
    assert metrics["values"]["loss"] == 0.1 + 0.2  # floats survive the text exactly
    assert (metrics["step"], metrics["tokens"], metrics["wall_s"]) == (1, 64, 0.5)
    assert abs(metrics["time"] - time.time()) < 600


def test_reopening_appends(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_steps(path, 1, 2)
    write_steps(path, 3)
    assert steps(path) == [1, 2, 3]


def test_a_torn_tail_of_any_length_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_steps(path, 1, 2)
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        expected = [1, 2][: whole[:end].count(b"\n")]
        assert steps(path) == expected, end
        write_steps(path, 9)  # reopening must not glue a record to half a line
        assert steps(path) == [*expected, 9], end
    assert first < len(whole)


def test_a_torn_tail_longer_than_the_read_window_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_steps(path, 1)
    with open(path, "ab") as handle:
        handle.write(b'{"kind":"event","note":"' + b"x" * 200_000)
    write_steps(path, 2)
    assert steps(path) == [1, 2]


def test_cut_drops_metrics_beyond_the_step_and_keeps_events(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_steps(path, 1, 2, 3, 4)
    with Journal(path) as journal:
        journal.event("checkpoint", step=4)
        assert journal.cut(2) == 2
        journal.metrics(3, 192, {"loss": 9.0}, 1.5)
    records = read_journal(path)
    assert steps(path) == [1, 2, 3]
    assert [r["name"] for r in records if r["kind"] == "event"] == ["checkpoint", "cut"]
    assert {k: records[-2][k] for k in ("step", "dropped")} == {"step": 2, "dropped": 2}


def test_cut_with_nothing_beyond_leaves_every_byte(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_steps(path, 1, 2)
    before = path.read_bytes()
    with Journal(path) as journal:
        assert journal.cut(2) == 0
    assert path.read_bytes() == before


def test_cut_to_zero_on_an_empty_journal(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    with Journal(path) as journal:
        assert journal.cut(0) == 0
    assert read_journal(path) == []


def test_metrics_table_is_tidy(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    write_steps(path, 1, 2)
    table = metrics_table(path)
    assert table.schema.equals(METRICS)
    assert table.to_pylist()[2:] == [
        {"step": 2, "tokens": 128, "name": "loss", "value": 0.5, "wall_s": 1.0},
        {"step": 2, "tokens": 128, "name": "lr", "value": 0.1, "wall_s": 1.0},
    ]
    (tmp_path / "empty.jsonl").touch()
    assert metrics_table(tmp_path / "empty.jsonl").schema.equals(METRICS)


@pytest.mark.parametrize("bad", [b"{oops\n", b'{"kind":"other"}\n', b"3\n"])
def test_a_damaged_line_is_named(tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "journal.jsonl"
    write_steps(path, 1)
    path.write_bytes(path.read_bytes() + bad + b'{"kind":"event","time":0,"name":"x"}\n')
    with pytest.raises(ArtifactError, match=r"journal\.jsonl line 2"):
        read_journal(path)
    with Journal(path) as journal, pytest.raises(ArtifactError, match="line 2"):
        journal.cut(0)


def test_a_missing_journal_is_named(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"nowhere\.jsonl is missing"):
        read_journal(tmp_path / "nowhere.jsonl")


def test_a_value_that_is_no_number_is_our_own_mistake(tmp_path: Path) -> None:
    with Journal(tmp_path / "journal.jsonl") as journal, pytest.raises(AssertionError):
        journal.metrics(1, 1, {"loss": float("nan")}, 0.0)


def test_disk_full_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "journal.jsonl"
    write_steps(path, 1)
    real = os.write
    calls: list[int] = []

    def short_then_full(handle: int, data: bytes) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return real(handle, data[:7])
        raise OSError(errno.ENOSPC, "No space left on device")

    with Journal(path) as journal:
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", short_then_full)
            with pytest.raises(ArtifactError, match=r"disk full while writing .*journal\.jsonl"):
                journal.event("checkpoint", step=1)
        journal.event("later")
    assert [record.get("name") for record in read_journal(path)] == [None, "later"]


def test_kill_9_while_writing_loses_at_most_one_line(tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    script = (
        "import sys, itertools, pathlib\n"
        "from abf.track.journal import Journal\n"
        "journal = Journal(pathlib.Path(sys.argv[1]))\n"
        "for n in itertools.count(1):\n"
        "    journal.metrics(n, n, {'loss': 1.0, 'pad': 0.123456789}, 0.0)\n"
        "    print(n, flush=True)\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, str(path)], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        acknowledged = next(int(line) for line in process.stdout if int(line) >= 50)
        process.send_signal(signal.SIGKILL)
        rest = [int(line) for line in process.stdout if line.endswith("\n")]
        process.wait()
    acknowledged = rest[-1] if rest else acknowledged
    found = steps(path)
    assert found == list(range(1, len(found) + 1))
    assert acknowledged <= len(found) <= acknowledged + 1
    assert all(json.loads(line) for line in path.read_bytes().splitlines()[:-1])
