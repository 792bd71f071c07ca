"""What a stage directory's records say of trying again; the cluster's part is in tests/slurm."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abf.errors import ConfigError, Interrupted
from abf.retries import failed_by_itself
from abf.track.attempts import ATTEMPTS, attempt


def attempted(directory: Path, error: BaseException | None) -> None:
    with attempt(directory, rule="decode", run="x", cores=1):
        if error is not None:
            raise error


@pytest.mark.parametrize(
    ("error", "refused"),
    [(ConfigError("x"), True), (RuntimeError("x"), True), (Interrupted("SIGTERM"), False)],
)
def test_an_error_of_ones_own_is_not_tried_again(
    tmp_path: Path, error: Exception, refused: bool
) -> None:
    with pytest.raises(type(error)):
        attempted(tmp_path, error)
    start = json.loads((tmp_path / ATTEMPTS).read_text().splitlines()[0])["start"]
    assert failed_by_itself(tmp_path, since=start) is refused
    # An earlier driver's says nothing of a job that lost its node before it began.
    assert not failed_by_itself(tmp_path, since=start + 1)


def test_a_killed_attempt_is_tried_again_and_damaged_records_are_not(tmp_path: Path) -> None:
    assert not failed_by_itself(tmp_path, since=0)
    attempted(tmp_path, None)
    opened, _ = (tmp_path / ATTEMPTS).read_text().splitlines()
    (tmp_path / ATTEMPTS).write_text(opened + "\n")
    assert not failed_by_itself(tmp_path, since=0)
    (tmp_path / ATTEMPTS).write_text("no record\n")
    assert failed_by_itself(tmp_path, since=0)
