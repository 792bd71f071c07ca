"""The driver's process, without a scheduler: how it is begun, and what its death leaves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from snakemake.common import SNAKEFILE_CHOICES

from abf.cli import main
from abf.files import write_json
from abf.profile import SNAKEFILES, require_snakefile
from tests.slurm.daemons import wait_for

ROOT = Path(__file__).parents[1]
STATE = {"job_id": "7", "study": "run.yaml", "state": "submitted"}
WORK = """
echo $$ >> pids
sh -c 'echo $$ >> pids; trap "" HUP INT TERM; while :; do echo tick >> ticks; sleep 0.05; done' &
wait
"""
"""A Snakemake with a rule that waits; the rule is deaf, as one in a call of the system is."""


def alive(pids: list[int]) -> list[int]:
    """Those that are neither gone nor only waiting to be buried."""
    found = []
    for pid in pids:
        stat = Path(f"/proc/{pid}/stat")
        try:
            found += [pid] * (stat.read_text().rpartition(")")[2].split()[0] != "Z")
        except OSError:
            continue
    return found


def test_a_driver_that_is_killed_takes_snakemake_and_its_rules_along(tmp_path: Path) -> None:
    write_json(tmp_path / "results/.driver/drive.json", STATE | {"command": ["sh", "-c", WORK]})
    driver = subprocess.Popen(
        [sys.executable, "-m", "abf.cli", "drive", "run", "--results", "results"],
        cwd=tmp_path,
        env=os.environ | {"SLURM_JOB_ID": "7"},
    )
    pids: list[int] = []
    try:
        wait_for("the rule", (tmp_path / "ticks").exists, seconds=60, every=0.02)
        pids += map(int, (tmp_path / "pids").read_text().split())
        assert len(alive(pids)) == 2
        assert os.getpgid(pids[0]) != os.getpgid(driver.pid)
        driver.kill()  # this process alone: no group, no cgroup
        driver.wait()
        wait_for("nothing of it", lambda: not alive(pids), seconds=20, every=0.02)
    finally:
        for pid in alive(pids):
            os.kill(pid, signal.SIGKILL)


@pytest.mark.parametrize("code", [0, 3])
def test_the_end_of_snakemake_is_the_drivers(tmp_path: Path, code: int) -> None:
    script = f"read line; test -z $line; exit {code}"  # its standard input is empty
    write_json(tmp_path / "results/.driver/drive.json", STATE | {"command": ["sh", "-c", script]})
    done = subprocess.run(
        [sys.executable, "-m", "abf.cli", "drive", "run", "--results", "results"],
        cwd=tmp_path,
        env=os.environ | {"SLURM_JOB_ID": "7"},
        timeout=60,
    )
    assert done.returncode == code


def test_a_folder_without_a_snakefile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert tuple(map(str, SNAKEFILE_CHOICES)) == SNAKEFILES
    assert require_snakefile(ROOT) == ROOT / "workflow" / "Snakefile"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_text("study: s\n")
    assert main(["drive", "start", "run.yaml"]) == 2
    said = capsys.readouterr().err
    assert f"abf drive: {tmp_path} has no Snakefile" in said
    assert f"cd {ROOT}, and run the same command there" in said
    (tmp_path / "Snakefile").touch()
    assert main(["drive", "start", "gone.yaml"]) == 2
    assert "gone.yaml does not exist" in capsys.readouterr().err
