"""One cluster for all tests that ask for it, in a new folder, ended with the session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.box import Box
from tests.slurm.micro import LONG, Study, copied, prepare
from tests.slurm.owner import Owner, remove_orphans
from tests.slurm.reliability import Report
from tests.slurm.training import curve

NO_SLURM = "no Slurm in a box"


@pytest.fixture(scope="session")
def box() -> Iterator[Box]:
    """A running cluster; the only skip of this repository, where no Slurm can be had."""
    if reason := Box.unavailable():
        pytest.skip(f"{NO_SLURM}: {reason}")
    remove_orphans()
    owner = Owner()
    try:
        cluster = Box(owner.root)
        cluster.up()
        yield cluster
    finally:
        owner.release()


@pytest.fixture(scope="session")
def prepared(box: Box, tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Everything before training, made once on this machine; tests take a copy."""
    return prepare(tmp_path_factory.mktemp("slurm"), box)


@pytest.fixture
def study(prepared: Study, tmp_path: Path) -> Study:
    """A copy of one's own."""
    return copied(prepared, tmp_path / "study")


@pytest.fixture(scope="session")
def uninterrupted(prepared: Study, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, float]:
    """The long training's curve when nothing happens to it."""
    study = copied(prepared, tmp_path_factory.mktemp("whole") / "study")
    directory = study.plan(LONG)
    done = study.run(directory)
    assert done.returncode == 0, done.stdout
    return curve(directory)


@pytest.fixture
def report() -> Report:
    """Writes what a fault did to a table, where the environment names one."""
    return Report()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once why, also without -rs."""
    reasons = [str(r.longrepr[2]) for r in terminalreporter.stats.get("skipped", [])]
    if ours := [r for r in reasons if NO_SLURM in r]:
        terminalreporter.write_line(
            f"{len(ours)} tests not run: {ours[0].removeprefix('Skipped: ')}", yellow=True
        )
