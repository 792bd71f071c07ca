"""Fixtures of the ledger tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from abf.grid import load_study
from abf.plan import Plan
from tests.ledger.accounting import RUN


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let sacct print these lines, squeue nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)

    def write(*lines: str, queue: str = "", **commands: str) -> None:
        texts = {"sacct": "".join(lines), "squeue": queue, **commands}
        for name, text in texts.items():
            (folder / f"{name}.txt").write_text(text)
            (folder / name).write_text(
                f"#!/bin/sh\necho call >> {folder}/{name}.calls\ncat {folder}/{name}.txt\n"
            )
            (folder / name).chmod(0o755)

    write()
    return write


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    def written(text: str = RUN) -> Plan:
        (tmp_path / "run.yaml").write_text(text)
        found = Plan(load_study(tmp_path / "run.yaml"), tmp_path / "results")
        found.write()
        return found

    return written
