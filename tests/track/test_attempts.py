"""The record of an attempt when the disk is full."""

from __future__ import annotations

import errno
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from abf.errors import ArtifactError
from abf.track import attempts
from abf.track.attempts import attempt, read_attempts


def test_the_closing_record_finds_room_on_a_full_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk whose last free bytes are those that were kept for it."""
    real = attempts._append

    def full(directory: Path, record: Mapping[str, Any]) -> None:
        if record["state"] != "RUNNING" and (directory / attempts.SPARE).exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        real(directory, record)

    monkeypatch.setattr(attempts, "_append", full)
    with (
        pytest.raises(ArtifactError, match="cannot be written"),
        attempt(tmp_path, rule="train", run="x", cores=1),
    ):
        assert (tmp_path / attempts.SPARE).stat().st_size == attempts.SPARE_BYTES
        raise ArtifactError("the checkpoint cannot be written")
    assert read_attempts(tmp_path)[-1]["reason"] == "the checkpoint cannot be written"
    assert not (tmp_path / attempts.SPARE).exists()
