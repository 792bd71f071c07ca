"""The command line: faults of files are one message, every command explains itself."""

from __future__ import annotations

import errno
import json
import os
import socket
import subprocess
from pathlib import Path

import pytest

from abf import cli, study
from abf.errors import ConfigError

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.EROFS, "the file system is read-only: mount it writable, or use another folder"),
        (errno.EACCES, "no permission"),
        (errno.EPERM, "no permission"),
        (errno.ENOSPC, "the disk is full; nothing half-written was kept: free space"),
        (errno.EDQUOT, "the disk is full"),
    ],
)
def test_a_file_that_cannot_be_written_is_named_with_a_remedy(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    remedy: str,
) -> None:
    def fail(grid: Path, results: Path) -> None:
        raise OSError(number, os.strerror(number), str(results / "plan"))

    monkeypatch.setattr(study, "print_plan", fail)
    assert cli.main(["plan", "my.yaml", "--results", "there"]) == 3
    said = capsys.readouterr().err
    assert said.startswith(f"abf plan: {Path('there', 'plan')}: ")
    assert remedy in said
    assert os.strerror(number) in said


def test_files_where_folders_should_be_and_the_reverse(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text("study: s\n")
    (tmp_path / "file").touch()
    assert cli.main(["plan", str(tmp_path / "run.yaml"), "--results", str(tmp_path / "file")]) == 3
    said = capsys.readouterr().err
    assert str(tmp_path / "file") in said
    assert "a part of the path is a file" in said
    assert cli.main(["config", str(tmp_path)]) == 3
    said = capsys.readouterr().err
    assert f"abf config: {tmp_path}: this is a folder, not a file" in said


@pytest.mark.parametrize("error", [OSError(errno.EPERM, "kill"), FileNotFoundError(2, "x", "y")])
def test_a_fault_of_ours_keeps_its_traceback(
    monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    def fail(grid: Path, results: Path) -> None:
        raise error

    monkeypatch.setattr(study, "print_plan", fail)
    with pytest.raises(OSError, match=str(error.strerror)):
        cli.main(["plan", "my.yaml"])


@pytest.mark.parametrize(
    "command",
    ["plan", "config", "ui", "link-profile", "status", "why", "keep", "gc", *cli.STAGE_COMMANDS],
)
def test_help_describes_and_gives_an_example(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    usage, _, rest = capsys.readouterr().out.partition("\n\n")
    assert usage.startswith(f"usage: abf {command}")
    assert rest.partition("\n\n")[0].endswith(".")
    assert f"example:\n  abf {command}" in rest


def test_a_port_that_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plan").mkdir()
    (tmp_path / "plan" / "s.json").write_text(json.dumps({"study": "s", "stages": [], "cells": []}))
    monkeypatch.setattr(study, "ingest_study", lambda *_: {"experiment": "1"})
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError) as caught:
            study.serve_ui(tmp_path, port)
    assert f"port {port} of 127.0.0.1 cannot be had (Address already in use)" in str(caught.value)
    assert "`make ui PORT=0` takes a free one" in str(caught.value)


def test_make_ui_takes_a_port() -> None:
    for arguments, port in ((["PORT=0"], 0), ([], 5000)):
        done = subprocess.run(
            ["make", "--dry-run", "ui", *arguments],
            cwd=ROOT,
            env={name: value for name, value in os.environ.items() if name != "PORT"},
            capture_output=True,
            text=True,
        )
        assert f"abf ui --port {port}\n" in done.stdout, done.stderr


@pytest.mark.parametrize("rank", [None, "0", "1"])
def test_the_same_command_is_every_rank(monkeypatch: pytest.MonkeyPatch, rank: str | None) -> None:
    called = []
    for name in ("run_stage", "follow_stage"):
        monkeypatch.setattr(
            cli, name, lambda *given, name=name, **options: called.append((name, given, options))
        )
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    where = ["results/train/x", "--accept", "config.optim.lr", "--accept", "seed"]
    assert cli.main(["train", *where]) == 0
    name = "follow_stage" if rank == "1" else "run_stage"
    accept = {"accept": ["config.optim.lr", "seed"]}
    assert called == [(name, ("train", Path("results/train/x")), accept)]
