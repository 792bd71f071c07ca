"""Files of our own that hold something else: one line or as good as missing, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from abf.cli import main
from abf.cluster.jobs import job_record
from abf.documents import parse_document
from abf.errors import ArtifactError
from abf.files import read_if_json, read_own, write_json
from abf.ledger.slurm import kept_records
from tests.keeping.made import TRAIN, make

MANIFEST = {
    "stage": "train", "stage_version": 1, "config": None, "inputs": {},
    "files": {"model/weights": {"bytes": 5, "sha256": "0"}}, "counts": {},
    "started": 100.0, "seconds": 60.0,
}  # fmt: skip
OTHERS = (None, 3, "x", [], ["a"], {}, {"a": 3}, {"a": {}})


def mutants(document: dict[str, object]) -> Iterator[bytes]:
    """Whole files of other kinds, and the document with each key gone or holding another thing."""
    yield from (b"[]", b"3", b"null", b"", b"{", b"\xff", b"{}", b"[" * 100_000)
    for key in document:
        yield json.dumps({k: v for k, v in document.items() if k != key}).encode()
        yield from (json.dumps(document | {key: other}).encode() for other in OTHERS)


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (b"{", "Expecting property name"),
        (b"[1]", "it: Input should be a valid dictionary"),
        (json.dumps(MANIFEST | {"files": [1]}).encode(), r"files: .* \(value \[1\]\)"),
        (json.dumps(MANIFEST | {"files": {"a": {"bytes": "1", "sha256": ""}}}).encode(),
         r"files.a.bytes: Input should be a valid integer \(value '1'\)"),
        (json.dumps(MANIFEST | {"stage": "cook"}).encode(), "stage: .* 'cook' is no stage"),
        (json.dumps({k: v for k, v in MANIFEST.items() if k != "counts"}).encode(),
         "counts: Field required$"),
        (json.dumps(MANIFEST | {"started": "today"}).encode(), "started: .* number .*'today'"),
        (json.dumps(MANIFEST | {"seconds": 1e300}).encode(), "seconds: .* less than or equal"),
    ],
)  # fmt: skip
def test_the_first_wrong_key_is_named_with_its_value(tmp_path: Path, raw: bytes, said: str) -> None:
    path = tmp_path / "manifest.json"
    with pytest.raises(ValueError, match=said):
        parse_document(path, raw)
    path.write_bytes(raw)
    assert read_if_json(path) is None
    write_json(path, MANIFEST)
    assert read_if_json(path) == MANIFEST


@pytest.mark.parametrize(
    "name",
    [f"{TRAIN}/manifest.json", f"{TRAIN}/config.json", f"kept/{TRAIN}/manifest.json",
     "kept/places.json", "plan/s.json", ".driver/drive.json"],
)  # fmt: skip
def test_no_damaged_file_is_a_traceback(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, store = make(tmp_path)
    (tmp_path / "site.yaml").write_text(f"account: a\nstorage: {{work: {tmp_path}/work}}\n")
    monkeypatch.setenv("ABF_SITE", str(tmp_path / "site.yaml"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no scheduler
    assert main(["keep", "--results", str(results)]) == 0
    drive = {"job_id": "1", "study": "s", "command": ["true"], "state": "finished"}
    write_json(results / ".driver" / "drive.json", drive)
    root = store.root if name.startswith("kept/") else results
    path = root / name.removeprefix("kept/")
    whole = path.read_bytes()
    commands = [("keep",), ("keep", "--restore"), ("gc",), ("drive", "status"), ("doctor",),
                ("why", TRAIN)]  # fmt: skip
    for raw in mutants(json.loads(whole)):
        for command in commands:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(raw)
            main([*command, "--results", str(results)])  # raises nothing
            assert "Traceback" not in capsys.readouterr().err
            if not path.exists() or path.read_bytes() != raw:  # restored, or lost by name
                shutil.rmtree(tmp_path / "scratch")
                shutil.rmtree(tmp_path / "work")
                make(tmp_path)
                main(["keep", "--results", str(results)])
                write_json(results / ".driver" / "drive.json", drive)


SITE = {
    "account": "a", "poll_seconds": 30, "max_minutes": 1440, "setup": ["x"],
    "allocation": {"node_hours": 10, "start": "2026-09-01", "end": "2027-03-31"},
    "node": {"cores": 32, "billing": 32}, "storage": {},
}  # fmt: skip
STRANGE = (None, 0, -1, 1e300, 10**40, float("nan"), "", "a\0b", "x" * 5000, "/dev/null",
           "LOOP", [], {}, ["a"], True, "9999-12-31")  # fmt: skip


def test_no_site_file_is_a_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    results, _ = make(tmp_path)
    loop, site = tmp_path / "loop", tmp_path / "site.yaml"
    loop.symlink_to("loop")
    monkeypatch.setenv("ABF_SITE", str(site))
    monkeypatch.setenv("PATH", str(tmp_path))
    storage = {"work": str(tmp_path / "work"), "scratch": str(tmp_path / "scratch"),
               "purge_days": 40, "keep_days": 60, "work_quota_gb": 1}  # fmt: skip
    sections = {
        "": SITE,
        "storage": storage,
        "node": SITE["node"],
        "allocation": SITE["allocation"],
    }
    for section, settings in sections.items():
        for key in settings:
            for value in STRANGE:
                changed = settings | {key: str(loop) if value == "LOOP" else value}
                whole = SITE | {"storage": storage} | ({section: changed} if section else changed)
                site.write_text(yaml.safe_dump(whole))
                for command in ("doctor", "keep", "gc") if section == "storage" else ("doctor",):
                    main([command, "--results", str(results)])  # raises nothing
    assert not (tmp_path / "abf-results").exists()
    capsys.readouterr()


@pytest.mark.parametrize("raw", [b"", b"{", b"[]", b"3", b"\xff"])
def test_a_damaged_record_of_a_job_is_no_missing_one(tmp_path: Path, raw: bytes) -> None:
    """Else the job that it tells of would be submitted once more."""
    assert job_record(tmp_path) == {}
    (tmp_path / "job.json").write_bytes(raw)
    with pytest.raises(ArtifactError, match="see with `squeue --me`"):
        job_record(tmp_path)


@pytest.mark.parametrize("raw", [b"{\n", b"[]\n", b'{"job_id": "7"}\n'])
def test_a_damaged_line_of_the_schedulers_records_is_named(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / ".driver").mkdir()
    (tmp_path / ".driver" / "records.jsonl").write_bytes(raw)
    with pytest.raises(ArtifactError, match=r"records.jsonl:1 is no record of a job"):
        kept_records(tmp_path)


@pytest.mark.parametrize("name", ["reserved.json", "used.json", "manifest.json"])
@pytest.mark.parametrize("raw", [b"{", b"[]", b'{"train/x": 3, "at": "x"}'])
def test_what_is_there_and_damaged_is_named(tmp_path: Path, name: str, raw: bytes) -> None:
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(ArtifactError, match=f"{name} is damaged .* delete it"):
        read_own(tmp_path / name)


@pytest.mark.parametrize("closed", ["| :", "| head -1 >/dev/null", ">&-"])
def test_the_doctors_exit_code_tells_whoever_reads(tmp_path: Path, closed: str) -> None:
    command = f"{sys.executable} -m abf.cli doctor {closed}; echo ${{PIPESTATUS[0]}} >&2"
    environment = os.environ | {"ABF_SITE": str(tmp_path / "none")}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.stderr == "1\n"
