"""One cluster for all tests that ask for it, in a new folder, ended with the session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.box import Box
from tests.slurm.micro import Study, prepare
from tests.slurm.owner import Owner, remove_orphans

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


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say once why, also without -rs."""
    reasons = [str(r.longrepr[2]) for r in terminalreporter.stats.get("skipped", [])]
    if ours := [r for r in reasons if NO_SLURM in r]:
        terminalreporter.write_line(
            f"{len(ours)} tests not run: {ours[0].removeprefix('Skipped: ')}", yellow=True
        )
