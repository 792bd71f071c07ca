"""Journal parts, attempt outcomes and clean names: pure functions, no MLflow."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import psutil
import pytest

from abf.errors import ArtifactError
from abf.track.attempts import ATTEMPTS, HEARTBEAT, attempt
from abf.track.journal import Journal
from abf.track.mlflow_points import clean_key, journal_stage, read_new_points
from abf.track.mlflow_progress import Progress, charge
from abf.track.mlflow_records import MAX_PARAM_CHARACTERS, clean_params
from abf.track.outcomes import attempt_outcomes
from tests.track.cells import rows_of


def running_record(attempt: int, start: float, **changes: object) -> dict[str, object]:
    return {
        "attempt": attempt,
        "job_id": f"job{attempt}",
        "host": socket.gethostname(),
        "pid": 2**22 + 1,  # beyond pid_max: no such process
        "pid_start": start,
        "rule": "train",
        "run": "r",
        "cores": 2,
        "gpus": 0,
        "start": start,
        "state": "RUNNING",
    } | changes


def write_attempts(directory: Path, *records: dict[str, object]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / ATTEMPTS).write_text("".join(json.dumps(r) + "\n" for r in records))


def test_outcomes_of_recorded_attempts(tmp_path: Path):
    with pytest.raises(ValueError, match="boom"), attempt(tmp_path, rule="t", run="r", cores=1):
        raise ValueError("boom")
    with attempt(tmp_path, rule="t", run="r", cores=1):
        (inside,) = attempt_outcomes(tmp_path)[1:]
        assert inside["state"] == "RUNNING"
    assert [o["state"] for o in attempt_outcomes(tmp_path)] == ["FAILED", "COMPLETED"]
    assert "boom" in attempt_outcomes(tmp_path)[0]["reason"]


def test_killed_attempt_lasts_to_its_heartbeat(tmp_path: Path):
    write_attempts(tmp_path, running_record(1, 1000.0))
    (tmp_path / HEARTBEAT).touch()
    os.utime(tmp_path / HEARTBEAT, (1042.0, 1042.0))
    (outcome,) = attempt_outcomes(tmp_path)
    assert outcome["state"] == "KILLED"
    assert outcome["elapsed_s"] == 42.0
    assert "without a closing record" in outcome["reason"]


def test_killed_attempt_followed_by_another(tmp_path: Path):
    later = running_record(2, 5000.0, last_heartbeat=1042.0)
    done = later | {"state": "COMPLETED", "reason": "", "end": 5010.0, "elapsed_s": 10.0}
    write_attempts(tmp_path, running_record(1, 1000.0), later, done)
    (tmp_path / HEARTBEAT).touch()
    killed, completed = attempt_outcomes(tmp_path)
    assert (killed["state"], killed["elapsed_s"]) == ("KILLED", 42.0)
    assert completed["state"] == "COMPLETED"


def test_same_process_number_with_another_start_is_a_stranger(tmp_path: Path):
    me = psutil.Process()
    write_attempts(tmp_path, running_record(1, 1000.0, pid=me.pid, pid_start=me.create_time()))
    (tmp_path / HEARTBEAT).touch()
    assert attempt_outcomes(tmp_path)[0]["state"] == "RUNNING"
    write_attempts(tmp_path, running_record(1, 1000.0, pid=me.pid, pid_start=1.0))
    assert attempt_outcomes(tmp_path)[0]["state"] == "KILLED"


def test_other_host_is_judged_by_its_heartbeat(tmp_path: Path):
    write_attempts(tmp_path, running_record(1, 1000.0, host="elsewhere"))
    (tmp_path / HEARTBEAT).touch()
    assert attempt_outcomes(tmp_path)[0]["state"] == "RUNNING"
    os.utime(tmp_path / HEARTBEAT, (2000.0, 2000.0))
    assert attempt_outcomes(tmp_path)[0]["state"] == "KILLED"


def state_of(results: Path, *stages: str) -> Progress | None:
    """Of directories `{stage}/x`, all charged to one run."""
    found, shared = charge(
        results, rows_of(results), {"x": {stage: results / stage / "x" for stage in stages}}
    )
    assert shared is None
    return found["x"]


def test_progress_states(tmp_path: Path):
    assert state_of(tmp_path, "train") is None
    end = {"reason": "", "end": 1010.0, "elapsed_s": 10.0}
    first = running_record(1, 1000.0) | {"run": "x"}
    train = tmp_path / "train" / "x"
    write_attempts(train, first, first | end | {"state": "FAILED"})
    found = state_of(tmp_path, "train", "score")
    assert found is not None
    assert (found.status, found.start, found.end) == ("FAILED", 1_000_000, 1_010_000)
    (row,) = found.charged("run")
    assert (row["stage"], row["state"], row["host"]) == ("train", "FAILED", socket.gethostname())
    assert row["core_hours"] == pytest.approx(2 * 10 / 3600)
    write_attempts(train, first, first | end | {"state": "COMPLETED"})
    (train / "manifest.json").write_text("{}")
    found = state_of(tmp_path, "train", "score")
    assert found is not None
    assert (found.status, found.end) == ("RUNNING", 1_010_000)
    # Nothing failed, but where no driver is at work nobody goes on with it.
    stages = {"x": {stage: tmp_path / stage / "x" for stage in ("train", "score")}}
    found = charge(tmp_path, rows_of(tmp_path), stages, driven=False)[0]["x"]
    assert found is not None
    assert found.status == "FAILED"
    found = state_of(tmp_path, "train")
    assert found is not None
    assert found.status == "FINISHED"


def journal_at(tmp_path: Path, stage: str = "train") -> Path:
    return tmp_path / stage / "key" / "journal.jsonl"


def test_new_points_go_on_from_the_offset_and_leave_a_torn_line(tmp_path: Path):
    path = journal_at(tmp_path)
    assert read_new_points(path, offset=0, tail="").points == []
    with Journal(path) as journal:
        journal.metrics(1, 100, {"loss": 3.0}, 0.1)
        journal.event("checkpoint", step=1)
    first = read_new_points(path, offset=0, tail="")
    assert [(p.key, p.value, p.step) for p in first.points] == [
        ("train/tokens", 100, 1),
        ("train/loss", 3, 1),
    ]
    with path.open("a") as handle:
        handle.write('{"kind": "metrics", "ti')
    again = read_new_points(path, offset=first.offset, tail=first.tail)
    assert (again.points, again.offset, again.rescanned) == ([], first.offset, False)
    with Journal(path) as journal:
        journal.metrics(2, 200, {"loss": 2.5}, 0.2)
    second = read_new_points(path, offset=first.offset, tail=first.tail)
    assert [p.step for p in second.points] == [2, 2]
    assert not second.rescanned


def test_cut_journal_is_read_from_its_start(tmp_path: Path):
    path = journal_at(tmp_path)
    with Journal(path) as journal:
        for step in range(1, 6):
            journal.metrics(step, step, {"loss": 1.0}, 0.0)
    part = read_new_points(path, offset=0, tail="")
    with Journal(path) as journal:
        assert journal.cut(2) == 3
    cut = read_new_points(path, offset=part.offset, tail=part.tail)
    assert cut.rescanned
    assert {p.step for p in cut.points} == {1, 2}
    with Journal(path) as journal:
        for step in range(3, 9):
            journal.metrics(step, step, {"loss": 1.0}, 0.0)
    grown = read_new_points(path, offset=part.offset, tail=part.tail)
    assert grown.rescanned
    assert {p.step for p in grown.points} == set(range(1, 9))


def test_broken_line_names_the_file(tmp_path: Path):
    path = journal_at(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text("{nonsense}\n")
    with pytest.raises(ArtifactError, match=r"journal\.jsonl: line b'\{nonsense\}'"):
        read_new_points(path, offset=0, tail="")


def test_prefix_and_clean_names(tmp_path: Path):
    assert journal_stage(journal_at(tmp_path)) == "train"
    assert journal_stage(journal_at(tmp_path, "base")) == "base"
    assert clean_key("decode/threshold@0.9: tpf") == "decode/threshold_0.9_ tpf"
    long = clean_params({"a[0]": "x" * (MAX_PARAM_CHARACTERS + 1)})
    assert list(long) == ["a_0_"]
    assert len(long["a_0_"]) == MAX_PARAM_CHARACTERS
    assert long["a_0_"].endswith("...")
