"""Why a job failed, from what its parts left; srun's lines are as Slurm 22.05 to 24 print them."""

from __future__ import annotations

from pathlib import Path

import pytest

from abf.track.endings import why_failed
from abf.track.outcomes import attempt_outcomes
from tests.attempts import closing, record, write

KILLED = "srun: error: lrdn0002: task 1: Killed\n"
EXITED = "srun: error: lrdn0001: task 0: Exited with exit code 7\n"


def why(directory: Path, log: str | None, *, asked: str = "9:0") -> str:
    if log is not None:
        (directory / ".job").mkdir(parents=True, exist_ok=True)
        (directory / ".job" / "12_0_log.err").write_text(log)
    return why_failed(directory, "12", lambda: asked)


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        # The first line is the cause; what srun ends after it is not.
        (KILLED + EXITED, "rank 1 on lrdn0002: Killed; then rank 0: loss is nan"),
        (
            "srun: error: lrdn0001: task 0: Out Of Memory\n",
            "rank 0 on lrdn0001: Out Of Memory; then rank 0: loss is nan",
        ),
        (
            "srun: error: lrdn[0001-0002]: tasks 4-5,7: Segmentation fault (core dumped)\n",
            "rank 4 on lrdn[0001-0002]: Segmentation fault (core dumped); then rank 0: loss is nan",
        ),
        # An exit of the one who wrote the record adds nothing to it.
        (EXITED + KILLED, "loss is nan"),
        (
            "srun: error: lrdn0002: task 5: Exited with exit code 1\n",
            "loss is nan (rank 5 on lrdn0002 ended first: Exited with exit code 1)",
        ),
        # Of an earlier start of the same job nothing is told.
        (f"=== start 0 on a\n{KILLED}=== start 1 on a\n{EXITED}", "loss is nan"),
        (None, "loss is nan"),
    ],
)
def test_what_srun_and_the_first_rank_say(tmp_path: Path, log: str | None, expected: str) -> None:
    opened = record(tmp_path, 1, 1000.0, job_id="12")
    write(tmp_path, opened, opened | closing(1000.0, 9.0, "FAILED", "loss is nan"))
    assert why(tmp_path, log) == expected


def test_a_first_rank_that_could_say_nothing(tmp_path: Path) -> None:
    other = record(tmp_path, 1, 900.0, job_id="11")
    opened = record(tmp_path, 2, 1000.0, job_id="12")
    write(tmp_path, other, other | closing(900.0, 9.0, "FAILED", "of another job"), opened)
    nobody = "no rank left a reason; the scheduler has exit code 1:0 (code:signal)"
    assert why(tmp_path, None, asked="1:0") == nobody
    assert why(tmp_path, "=== start 0 on a\nmodule: not found\n", asked="1:0") == nobody
    assert why(tmp_path, EXITED) == "rank 0 on lrdn0001: Exited with exit code 7"


def test_the_schedulers_word_goes_before_a_fresh_heartbeat(tmp_path: Path) -> None:
    write(tmp_path, record(tmp_path, 1, 1000.0, job_id="12", host="elsewhere"))
    (tmp_path / ".heartbeat").touch()
    assert attempt_outcomes(tmp_path)[0]["state"] == "RUNNING"
    (tmp_path / "job.json").write_text('{"job_id": "11", "ended": "FAILED"}')
    assert attempt_outcomes(tmp_path)[0]["state"] == "RUNNING"
    (tmp_path / "job.json").write_text('{"job_id": "12", "ended": "FAILED"}')
    assert attempt_outcomes(tmp_path)[0]["state"] == "KILLED"
