"""Ledger rows against records written by the attempt recorder and by hand."""

from __future__ import annotations

import os
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from abf.artifacts import LEDGER, read_table
from abf.errors import ArtifactError
from abf.ledger.build import build_ledger
from abf.track.attempts import ATTEMPTS, HEARTBEAT, attempt
from tests.attempts import closing, record, write


def rows_of(out: Path) -> list[dict[str, Any]]:
    return read_table(out / "ledger.parquet", LEDGER).to_pylist()


def test_one_row_per_attempt(tmp_path: Path):
    train, score = tmp_path / "train" / "fixed-0", tmp_path / "score" / "fixed-0"
    first, second = record(train, 1, 1000.0), record(train, 2, 2000.0)
    meter = {"energy_j": 12.5, "energy_source": "rapl:package"}
    write(
        train,
        first,
        first | closing(1000.0, 100.0, "FAILED", "loss is nan"),
        second,
        second | closing(2000.0, 360.0, "COMPLETED") | meter,
        tail='{"attempt": 3, "sta',
    )
    killed = record(score, 1, 3000.0, cores=1)
    write(score, killed)
    (score / HEARTBEAT).touch()
    os.utime(score / HEARTBEAT, (3036.0, 3036.0))

    counts = build_ledger(tmp_path, [score, train, train / "manifest.json"], tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    assert [(r["rule"], r["attempt"], r["state"]) for r in rows] == [
        ("train", 1, "FAILED"),
        ("train", 2, "COMPLETED"),
        ("score", 1, "KILLED"),
    ]
    assert [r["core_hours"] for r in rows] == pytest.approx([200 / 3600, 0.2, 0.01])
    assert [r["elapsed_s"] for r in rows] == [100.0, 360.0, 36.0]
    assert [r["energy_j"] for r in rows] == [None, 12.5, None]
    assert [r["energy_source"] for r in rows] == ["not measured", "rapl:package", "not measured"]
    assert rows[0]["reason"] == "loss is nan"
    assert datetime.fromisoformat(rows[0]["submit_time"]).timestamp() == 1000.0
    assert {(r["cluster"], r["nodes"], r["node_hours"]) for r in rows} == {("local", 0, None)}
    assert counts["attempts"] == 3
    assert counts["failed"] == 2
    assert counts["core_hours"] == pytest.approx(200 / 3600 + 0.21)


def test_a_schedulers_job_without_a_record_yet_is_no_local_run(tmp_path: Path):
    directory = tmp_path / "train" / "r"
    opened = record(directory, 1, 1000.0, job_id="4711")
    write(directory, opened, opened | closing(1000.0, 360.0, "COMPLETED"))
    counts = build_ledger(tmp_path, [directory], tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert (row["cluster"], row["core_hours"], row["node_hours"]) == ("scheduler", None, None)
    assert (counts["attempts"], counts["core_hours"], counts["node_hours"]) == (1, 0, 0)
    assert row["elapsed_s"] == 360
    # What a driver's job does on the side is a local run.
    fetch = tmp_path / "fetch" / "r"
    opened = record(fetch, 1, 1000.0, job_id="4712")
    write(fetch, opened, opened | closing(1000.0, 360.0, "COMPLETED"))
    assert build_ledger(tmp_path, [fetch], tmp_path / "out")["core_hours"] == pytest.approx(0.2)


def test_run_is_the_key_of_the_stage_directory(tmp_path: Path):
    """Decodes of two runs have the same folder name; their keys differ."""
    for run in ("a", "b"):
        directory = tmp_path / "decode" / run / "task.ar"
        directory.mkdir(parents=True)
        with attempt(directory, rule="decode", run="task.ar", cores=1):
            pass
    build_ledger(tmp_path, [Path("decode/a/task.ar"), Path("decode/b/task.ar")], tmp_path / "out")
    assert sorted(row["run"] for row in rows_of(tmp_path / "out")) == ["a/task.ar", "b/task.ar"]


def test_order_of_the_directories_does_not_matter(tmp_path: Path):
    directories = []
    for number in range(4):
        directory = tmp_path / "train" / f"r{number}"
        opened = record(directory, 1, 1000.0 + number % 2)
        directories.append(write(directory, opened, opened | closing(1000.0, 5.0, "COMPLETED")))
    build_ledger(tmp_path, directories, tmp_path / "one")
    build_ledger(tmp_path, directories[::-1], tmp_path / "two")
    one, two = (tmp_path / name / "ledger.parquet" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_nothing_attempted_gives_an_empty_table(tmp_path: Path):
    counts = build_ledger(tmp_path, [tmp_path / "train" / "none"], tmp_path / "out")
    assert counts["attempts"] == 0
    assert rows_of(tmp_path / "out") == []


def test_running_attempt_is_charged_so_far(tmp_path: Path):
    directory = tmp_path / "report" / "r"
    directory.mkdir(parents=True)
    before = time.time()
    with attempt(directory, rule="report", run="r", cores=1):
        build_ledger(tmp_path, [Path("report/r")], tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert row["state"] == "RUNNING"
    began = datetime.fromisoformat(row["submit_time"]).timestamp()
    assert before - 0.01 <= began
    assert row["elapsed_s"] <= time.time() - before + 0.01


def test_record_without_a_field_is_named(tmp_path: Path):
    directory = tmp_path / "train" / "r"
    opened = record(directory, 1, 1.0)
    del opened["cores"]
    write(directory, opened, opened | closing(1.0, 1.0, "COMPLETED"))
    with pytest.raises(ArtifactError, match=r"attempts\.jsonl:1 lacks cores"):
        build_ledger(tmp_path, [directory], tmp_path / "out")


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("garbage", "is not JSON (expected value)"),
        ("\0\0\0", "is not JSON"),
        ("[1]", "holds a list, not a record"),
        ('{"state": "RUNNING"}', "lacks attempt, cores"),
    ],
)
def test_line_that_is_no_record_is_named(tmp_path: Path, line: str, expected: str):
    directory = tmp_path / "train" / "r"
    write(directory, record(directory, 1, 1.0), tail=f"{line}\n")
    with pytest.raises(ArtifactError) as caught:
        build_ledger(tmp_path, [directory], tmp_path / "out")
    assert f"{directory / ATTEMPTS}:2 {expected}" in str(caught.value)
    assert "Delete the line" in str(caught.value)
