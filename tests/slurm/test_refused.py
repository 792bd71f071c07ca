"""What every job of a site file would be refused for, said by a driver before the first one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.box import Box
from tests.slurm.micro import SITE
from tests.slurm.test_profile_run import Site


@pytest.mark.parametrize(
    ("right", "wrong", "message"),
    [
        (
            "account: euhpc_test",
            "account: nobodys",
            "account: 'nobodys' is not one of root's: root",
        ),
        ("poll_seconds: 1", "qos: nosuch", "qos: qos='nosuch' does not exist; it may use"),
        ("poll_seconds: 1", "partition: nosuch", "partition='nosuch' does not exist; there are"),
    ],
)
def test_nothing_is_submitted(
    box: Box, tmp_path: Path, right: str, wrong: str, message: str
) -> None:
    (tmp_path / "user").mkdir()
    site = Site(tmp_path / "user", box)
    path = Path(site.env["XDG_CONFIG_HOME"]) / "abf" / "site.yaml"
    path.write_text(SITE.replace(right, wrong))
    for command in (site.snakemake(), ["abf", "drive", "start", "run.yaml"]):
        done = site.call(*command)
        assert done.returncode != 0
        assert "nothing was submitted (`abf doctor` checks the same and more):" in done.stdout
        assert message in done.stdout
        assert "Traceback" not in done.stdout
    assert site.jobs() == []
    # No rule has begun either.
    assert not list(site.folder.glob("results/*/*/attempts.jsonl"))
