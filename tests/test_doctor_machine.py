"""What the doctor concludes on disks, the environment, the profile, data and the site file."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
import yaml

from abf import doctor
from abf.checked import validate
from abf.cluster import disks
from abf.cluster.checks import Finding
from abf.cluster.config import AllocationConfig, NodeConfig, SiteConfig, StorageConfig
from abf.grid import load_study
from abf.plan import Plan
from abf.profile import link_profile
from tests.doctor_cases import told, view

# --- disks -------------------------------------------------------------------------------------


def old(path: Path, days: float) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x" * 1000)
    then = time.time() - days * 86400
    os.utime(path, (then, then))


def test_files_that_a_purge_takes_next(tmp_path: Path) -> None:
    old(tmp_path / "a" / "new", 1)
    told(disks.purge(tmp_path, 40), "OK", "no file of 1")
    old(tmp_path / "a" / "aged", 33)
    old(tmp_path / "oldest", 38)
    found = disks.purge(tmp_path, 40)
    told(
        found, "WARN", "2 file(s)", "older than 32 of 40 days", f"{tmp_path}/oldest, goes in 2 day"
    )
    read = time.time()
    os.utime(tmp_path / "oldest", (read, read - 38 * 86400))
    told(disks.purge(tmp_path, 40), "WARN", "1 file(s)", "a/aged, goes in 7 day")
    told(disks.purge(tmp_path, None), "WARN", "storage.purge_days")


def test_a_tree_that_is_too_large_is_said_to_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        old(tmp_path / name, 50)
    monkeypatch.setattr(disks, "WALK_ENTRIES", 2)
    told(disks.purge(tmp_path, 40), "WARN", "2 file(s)", "of the first 2 looked at", "is overdue")


@pytest.mark.parametrize(
    ("share", "level", "words"),
    [
        (0.5, "OK", "GiB free"),
        (0.04, "WARN", "less than 5%: free space soon"),
        (0.0, "FAIL", "as good as full"),
    ],
)
def test_room_left_on_a_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, level: str, words: str
) -> None:
    """The room is given here: what this machine's disk has left is nothing to test by."""
    status = os.statvfs(tmp_path)
    total = status.f_blocks * status.f_frsize
    monkeypatch.setattr(disks, "free_bytes", lambda place: int(share * total))
    told(disks.space("results", tmp_path / "not" / "yet", key="--results"), level, words)


def test_folders_that_cannot_be_used(tmp_path: Path) -> None:
    gone = disks.space("work", tmp_path / "gone", key="storage.work", must_exist=True)
    told(gone, "FAIL", "is no folder: correct storage.work")
    told(disks.space("results", Path("/proc/self"), key="--results"), "FAIL", "nothing can be writ")
    scratch = StorageConfig(scratch=tmp_path, purge_days=40)
    lines = [str(f) for f in disks.disks(tmp_path / "results", scratch)]
    assert any("lies on scratch" in line for line in lines)
    assert any("name the folder in the site file, `storage.work`" in line for line in lines)


def test_quota_by_a_walk_and_by_lustre(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = tmp_path / "work"
    old(work / "file", 1)
    (found,) = disks.quota(work, 1.0)
    told(found, "FAIL", "0.0 of 1.0 GB used (counted over 1 files", "nothing more fits")
    told(next(disks.quota(work, None)), "WARN", "set storage.work_quota_gb")
    # As `lfs quota -q` prints: a long path on a line of its own, an exceeded figure with a star.
    lfs = tmp_path / "bin" / "lfs"
    lfs.parent.mkdir()
    lfs.write_text(
        '#!/bin/sh\ntest "$1 $2 $3" = "quota -q -g" || exit 64\n'
        'echo "$5"; echo "  900000000* 0 1000000000 - 1200 0 0 -"\n'
    )
    lfs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{lfs.parent}{os.pathsep}{os.environ['PATH']}")
    (found,) = disks.quota(work, 1.0)
    told(found, "OK", "921.6 of 1,024.0 GB used (as Lustre counts")


# --- environment, profile, data ----------------------------------------------------------------


def test_versions_are_compared_with_the_pins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = doctor.CONSTRAINTS.read_text()
    pins = tmp_path / "constraints.txt"
    monkeypatch.setattr(doctor, "CONSTRAINTS", pins)
    pins.write_text(text)
    (found,) = doctor.environment()
    told(found, "OK", "snakemake-executor-plugin-slurm 2.8.0", "as pinned")
    pins.write_text(text.replace("torch==2.13.0", "torch==2.12.0"))
    (found,) = doctor.environment()
    told(found, "WARN", "torch 2.13.0 (pinned 2.12.0)")
    pins.write_text(text.replace("plugin-slurm==2.8.0", "plugin-slurm==2.7.0"))
    (found,) = doctor.environment()
    told(found, "FAIL", "snakemake-executor-plugin-slurm 2.8.0 (pinned 2.7.0): pip install -c")


def test_the_profile_is_found_as_snakemake_finds_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    unlinked, good = doctor.status(view(), "leonardo")
    told(unlinked, "WARN", "does not find 'leonardo' by its name: run `make setup`")
    told(good, "OK", "MinJobAge=300 s >= 3 x 40")
    link_profile("leonardo", doctor.ROOT / "profiles", tmp_path)
    assert list(doctor.status(view(), "leonardo")) == [good]
    told(next(doctor.status(view(), "lumi")), "FAIL", f"nor one of {tmp_path}/snakemake")


RUN = """
study: fetched
sources:
  - {kind: pypi, requirement: "pkg==1.0", member: a.json, layout: mapping, text_field: t,
     licence: CC0-1.0, attribution: somebody}
  - {kind: hub, name: owner/data}
  - {kind: local, path: "PLACE/*.txt"}
"""


def test_data_that_is_not_here_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study, results = tmp_path / "run.yaml", tmp_path / "results"
    study.write_text(RUN.replace("PLACE", str(tmp_path)))

    def found() -> list[Finding]:
        return list(doctor.offline(Plan(load_study(study), results), study, "leonardo"))

    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    (waiting,) = found()
    told(waiting, "WARN", "fetch/pkg-", "fetch/hub-", "snakemake --profile leonardo --config")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (forbidden,) = found()
    told(forbidden, "FAIL", "HF_HUB_OFFLINE=1 forbids it: unset it and run `snakemake")
    for place in [i.place for i in Plan(load_study(study), results).instances.values()]:
        if place.startswith("fetch/"):
            (results / place).mkdir(parents=True)
            (results / place / "manifest.json").write_text("{}")
    (done,) = found()
    told(done, "OK", "2 stage(s) from a network, all fetched")


# --- the whole page, the site file -------------------------------------------------------------


def test_without_slurm_and_without_a_site_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("ABF_SITE", str(tmp_path / "site.yaml"))
    assert not doctor.doctor(tmp_path / "results", None, "leonardo", job=False)
    assert "account: YOUR_ACCOUNT" in capsys.readouterr().out
    (tmp_path / "site.yaml").write_text("account: mine\n")
    assert not doctor.doctor(tmp_path / "results", None, "leonardo", job=True)
    said = capsys.readouterr().out
    assert "no sbatch, srun, squeue, sacct, scancel, scontrol, sacctmgr, sshare here" in said
    assert "1 FAIL; mend what FAILed" in said


def test_every_key_of_a_site_file_is_explained() -> None:
    text = (doctor.ROOT / "docs" / "leonardo.md").read_text()
    page = text.partition("```yaml\n")[2].partition("```")[0]
    own = {"allocation": AllocationConfig, "storage": StorageConfig, "node": NodeConfig}
    written = validate(SiteConfig, yaml.safe_load(page), "docs/leonardo.md")
    assert written.model_fields_set == SiteConfig.model_fields.keys()
    for key, model in own.items():
        assert getattr(written, key).model_fields_set == model.model_fields.keys(), key
