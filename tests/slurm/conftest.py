"""One cluster for all tests that ask for it, in a new folder, ended with the session."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from abf.cluster.config import NodeConfig
from abf.ledger.slurm import scheduled_rows
from tests.slurm.books import assert_same
from tests.slurm.box import Box
from tests.slurm.daemons import wait_for
from tests.slurm.jobs import jobs_of
from tests.slurm.micro import LONG, Study, copied, prepare
from tests.slurm.owner import Owner, remove_orphans
from tests.slurm.reliability import Report
from tests.slurm.training import curve, job_id

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
def books(box: Box, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict]]:
    """A check that the ledger of stage directories equals sacct once the last of their jobs ended.

    They must be all that jobs were submitted for from their folder. Returns sacct's rows.
    """
    monkeypatch.setenv("SLURM_CONF", box.env["SLURM_CONF"])

    def agree(*directories: Path) -> list[dict]:
        results = directories[0].parents[1]
        folder = results.parent
        mine = {job for directory in directories if (job := job_id(directory)) is not None}

        def heard() -> bool:
            """The accounting hears of a job, and of its end, some seconds late."""
            rows = jobs_of(box, folder)
            known = mine <= {row["JobIDRaw"] for row in rows}
            return known and all(row["End"] != "Unknown" for row in rows)

        wait_for("the end of every job in the accounting", heard, seconds=60, every=0.5)
        monkeypatch.chdir(folder)
        places = [directory.relative_to(results).as_posix() for directory in directories]
        told = jobs_of(box, folder)
        assert_same(scheduled_rows(Path("results"), places, node=NodeConfig()), told)
        return told

    return agree


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
