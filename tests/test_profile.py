"""`make setup` links the profile name, keeps an identical link, and replaces nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from abf.errors import ConfigError
from abf.profile import link_profile

ROOT = Path(__file__).parents[1]
PROFILES = ROOT / "profiles"


def test_link_is_made_and_kept(tmp_path: Path) -> None:
    assert "now points to" in link_profile("leonardo", PROFILES, tmp_path)
    link = tmp_path / "snakemake" / "leonardo"
    assert link.resolve() == PROFILES / "leonardo"
    assert "already points" in link_profile("leonardo", PROFILES, tmp_path)


@pytest.mark.parametrize("what", ["folder", "file", "link", "dangling"])
def test_anything_else_is_refused_by_name_and_left_alone(tmp_path: Path, what: str) -> None:
    place = tmp_path / "snakemake" / "leonardo"
    place.parent.mkdir()
    other = tmp_path / "other"
    other.mkdir()
    match what:
        case "folder":
            place.mkdir()
        case "file":
            place.write_text("mine")
        case "link":
            place.symlink_to(other)
        case "dangling":
            place.symlink_to(tmp_path / "gone")
    before = os.lstat(place)
    with pytest.raises(ConfigError, match="snakemake/leonardo is a"):
        link_profile("leonardo", PROFILES, tmp_path)
    assert os.lstat(place) == before


def test_unknown_profile_lists_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there are: leonardo, local"):
        link_profile("lumi", PROFILES, tmp_path)


def test_snakemake_finds_the_profile_by_its_bare_name(tmp_path: Path) -> None:
    """The profile is parsed whole: an option Snakemake does not know would be an error here."""
    link_profile("leonardo", PROFILES, tmp_path)
    environment = os.environ | {"XDG_CONFIG_HOME": str(tmp_path), "ABF_ACCOUNT": "someone"}
    command = [sys.executable, "-m", "snakemake", "--profile", "leonardo", "-n", "-q", "all"]
    done = subprocess.run(
        [*command, "--config", f"results={tmp_path / 'results'}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "train" in done.stdout + done.stderr


def test_profile_folders_hold_only_their_config() -> None:
    """A value that equals a file name in there would silently become that path."""
    for folder in PROFILES.iterdir():
        assert [path.name for path in folder.iterdir()] == ["config.yaml"]
