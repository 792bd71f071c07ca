"""What a purge took comes back as it was, or is named as lost; killed at every step."""

from __future__ import annotations

import json
import os
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest

from abf.artifacts import damage, read_manifest
from abf.cli import main
from abf.cluster.config import StorageConfig
from abf.errors import ArtifactError
from abf.files import lock, write_json
from abf.grid import load_study
from abf.keep import bring_back
from abf.keeping import restore as restore_module
from abf.keeping.restore import missing, restore, restore_books, uncover
from abf.keeping.store import Store
from abf.ledger.slurm import kept_records
from abf.plan import Plan
from abf.stages import MANIFEST, STAGES
from tests.keeping.made import DECODE, FILES, TOKENS, TRAIN, attempt, deaths, make, tree
from tests.workflow.conftest import RUN


def kept(folder: Path) -> tuple[Path, Store]:
    """A results folder, and its store that has everything."""
    results, store = make(folder)
    with store.held("test"):
        store.keep(FILES)
    return results, store


def back(results: Path, store: Store | None) -> tuple[list[str], list[str]]:
    """Places that are lost, and everything that was said."""
    said: list[str] = []
    gone = missing(list(FILES), results, store)
    return [one.place for one in restore(gone, results, store, say=said.append)], said


def test_an_emptied_folder_comes_back_as_it_was(tmp_path: Path) -> None:
    results, store = kept(tmp_path)
    before = tree(results)
    shutil.rmtree(results)
    began = time.time()
    assert restore_books(results, store) == ["plan/s.json"]
    lost, said = back(results, store)
    assert (lost, len(said)) == ([], 3)
    assert f"restored {TRAIN} (0.0 MB) from {store.root / TRAIN}: it is not there" in said
    after = tree(results)
    assert {n: v for n, v in after.items() if "attempts" not in n} == {
        n: v for n, v in before.items() if "attempts" not in n
    }
    manifest, done = results / TRAIN / MANIFEST, results / TRAIN / ".done" / MANIFEST
    assert manifest.stat().st_ino == done.stat().st_ino
    # Old by what was written, new to a purge that asks when a file was read.
    assert min(path.stat().st_atime for path in (results / TRAIN).rglob("model/*")) >= began - 1
    assert missing(list(FILES), results, store) == []


def test_only_what_is_missing_comes_back_and_newer_records_stay(tmp_path: Path) -> None:
    results, store = kept(tmp_path)
    (results / TRAIN / "model" / "weights").unlink()
    more = json.dumps(attempt(2, "RUNNING", "9")) + "\n"
    with open(results / TRAIN / "attempts.jsonl", "a") as handle:
        handle.write(more)
    (results / TRAIN / "ckpt").mkdir()
    tokens = (results / TOKENS / MANIFEST).stat()
    (one,) = missing(list(FILES), results, store)
    assert "weights is missing, its manifest says 5000 bytes" in one.fault
    lost, said = back(results, store)
    assert (lost, len(said)) == ([], 1)
    read_manifest(results / TRAIN)
    assert (results / TRAIN / "attempts.jsonl").read_text().endswith(more)
    assert (results / TRAIN / "ckpt").is_dir()
    assert (results / TOKENS / MANIFEST).stat() == tokens


def test_what_nobody_kept_is_lost_by_name_and_can_be_made_again(tmp_path: Path) -> None:
    results, store = kept(tmp_path)
    shutil.rmtree(store.root / TRAIN)
    shutil.rmtree(store.root / TOKENS)
    (results / TRAIN / "model" / "weights").unlink()
    write_json(results / TRAIN / "job.json", {"job_id": "7", "name": "abf-train"})
    shutil.rmtree(results / TOKENS)
    lost, said = back(results, store)
    assert lost == [TOKENS, TRAIN]
    assert said[0].startswith(f"lost: {TOKENS}: it is not there, and was finished once; ")
    assert "weights is missing" in said[1]
    assert f"{store.root} has no copy. It is made again if something needs it" in said[1]
    # No marks of finished work, and nobody waits for the job that made it; its records stay.
    assert not (results / TRAIN / MANIFEST).exists()
    assert not (results / TRAIN / ".done" / MANIFEST).exists()
    assert json.loads((results / TRAIN / "job.json").read_text())["ended"] == "LOST"
    assert (results / TRAIN / "attempts.jsonl").exists()
    # Another job, submitted since, is waited for.
    write_json(results / TRAIN / "job.json", {"job_id": "8", "name": "abf-train"})
    assert back(results, store)[0] == [TOKENS, TRAIN]
    assert "ended" not in json.loads((results / TRAIN / "job.json").read_text())


def test_traces_of_what_was_finished(tmp_path: Path) -> None:
    results, _ = make(tmp_path)
    shutil.rmtree(results / TOKENS)
    (one,) = missing(list(FILES), results, None)
    assert (one.place, one.fault) == (TOKENS, f"it is not there, and {TRAIN} was made from it")
    assert "storage.work" in one.why
    for directory in (results / TRAIN, results / DECODE):
        (directory / MANIFEST).unlink()
        (directory / ".done" / MANIFEST).unlink()
    gone = {one.place: one.fault for one in missing(list(FILES), results, None)}
    assert gone == dict.fromkeys((TRAIN, DECODE), "it is not there, and was finished once")
    for directory in (results / TRAIN, results / DECODE):
        (directory / "attempts.jsonl").unlink()
    assert missing(list(FILES), results, None) == []  # a study that was never run


def test_finished_work_that_is_not_declared(tmp_path: Path) -> None:
    results, store = kept(tmp_path)
    before = tree(results)
    (results / TRAIN / MANIFEST).unlink()
    assert missing(list(FILES), results, None) == []  # its rule declares it
    assert back(results, store)[1][0].endswith(f"{TRAIN}: it has no manifest.json")
    assert tree(results) == before


def test_a_copy_that_is_no_good_is_not_restored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, store = kept(tmp_path)
    copy = store.root / TRAIN / "model" / "weights"
    times = copy.stat()
    copy.write_bytes(b"v" * 5000)
    os.utime(copy, ns=(times.st_atime_ns, times.st_mtime_ns))  # nobody wrote: a bit flipped
    (store.root / DECODE / "samples.parquet").unlink()
    shutil.rmtree(results / TRAIN)
    shutil.rmtree(results / DECODE)
    lost, said = back(results, store)
    assert lost == [TRAIN, DECODE]
    assert any(f"{copy} is not what its manifest says" in line for line in said)
    assert any("its copy is not whole: " in line for line in said)
    assert not (results / TRAIN / MANIFEST).exists()
    shutil.rmtree(results / TOKENS)
    monkeypatch.setitem(STAGES, "tokenize", replace(STAGES["tokenize"], version=99))
    assert "is of stage version 1, now it is 99" in back(results, store)[1][0]


def test_a_place_where_somebody_works_is_left_alone(tmp_path: Path) -> None:
    results, store = kept(tmp_path)
    shutil.rmtree(results / TRAIN)
    with lock(results / TRAIN, "abf train"):
        lost, said = back(results, store)
    assert lost == []
    assert "is in use by abf train, process" in said[0]
    assert not (results / TRAIN / MANIFEST).exists()


def test_a_restoring_killed_at_any_step_goes_on(tmp_path: Path) -> None:
    results, store = kept(tmp_path)
    before = tree(results)
    (results / TRAIN / "model" / "weights").unlink()
    died = 0
    for died in deaths(lambda: back(results, store)):
        for path in results.rglob(MANIFEST):
            directory = path.parent.parent if path.parent.name == ".done" else path.parent
            fault = damage(directory, json.loads(path.read_bytes()))
            # The purged file is known to be missing, until its directory loses its marks.
            assert fault is None or "weights is missing" in fault
        if died % 2:
            assert back(results, store)[0] == []
            assert not list(results.rglob(".restoring"))
            shutil.rmtree(results / TRAIN)
            shutil.rmtree(results / "decode")
    assert died > 20
    after = tree(results)
    assert {n: v[0] for n, v in after.items()} == {n: v[0] for n, v in before.items()}


def test_no_room_to_restore_to(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results, store = kept(tmp_path)
    shutil.rmtree(results)
    monkeypatch.setattr(restore_module, "free_bytes", lambda path: 10**8)
    with pytest.raises(ArtifactError, match=r"must be restored to .*, where 0.1 GB are free"):
        back(results, store)


def test_the_schedulers_records_come_back_and_are_only_added_to(tmp_path: Path) -> None:
    results, store = kept(tmp_path)
    record = {
        "cluster": "c", "job_id": "1", "name": "n", "comment": "abf train x", "account": "a",
        "submit": 1, "start": 2, "end": None, "elapsed_s": 5, "limit_min": 1, "state": "RUNNING",
        "reason": "", "exit_code": "0:0", "billing": 32.0, "nodes": 1, "gpus": 4,
        "energy_j": None, "user": "u", "requested_billing": 32.0, "tasks": 1,
    }  # fmt: skip
    path = results / ".driver" / "records.jsonl"
    path.parent.mkdir(parents=True)

    def keep(*changes: dict[str, object]) -> list[tuple[str, object]]:
        path.write_text("".join(json.dumps(record | change) + "\n" for change in changes))
        with store.held("test"):
            store.keep(FILES)
        return sorted((a.job_id, a.end) for a in kept_records(store.root).values())

    assert keep({}, {"job_id": "2", "end": 9}) == [("1", None), ("2", 9)]
    assert keep({"end": 8}) == [("1", 8), ("2", 9)]
    assert keep({}) == [("1", 8), ("2", 9)]
    path.unlink()
    assert restore_books(results, store) == ["2 records of jobs"]
    assert len(kept_records(results)) == 2


def test_what_stands_before_something_lost_gives_way(tmp_path: Path) -> None:
    results, _ = make(tmp_path)
    made_from = {TOKENS: [], TRAIN: [TOKENS], DECODE: [TRAIN], "decode/new": [TRAIN, TOKENS]}
    uncover(frozenset({TOKENS}), made_from, results)
    assert not (results / TRAIN / MANIFEST).exists()
    assert (results / TRAIN / ".done" / MANIFEST).exists()  # finished: its rule declares it
    assert (results / DECODE / MANIFEST).exists()  # nothing new is made from it
    assert (results / TOKENS / MANIFEST).exists()
    shutil.copy2(results / TRAIN / ".done" / MANIFEST, results / TRAIN / MANIFEST)
    uncover(frozenset({TOKENS}), made_from | {"decode/new": [TRAIN]}, results)
    assert (results / TRAIN / MANIFEST).exists()  # nobody who runs reads what is lost


def test_a_project_area_that_is_not_there_stops_a_driver(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else all that was purged would seem to be lost, and be computed again."""
    (tmp_path / "run.yaml").write_text(RUN)
    plan = Plan(load_study(tmp_path / "run.yaml"), tmp_path / "results")
    gone = StorageConfig(work=tmp_path / "unmounted")
    with pytest.raises(ArtifactError, match=r"unmounted is no folder: .* until the file system"):
        bring_back(plan, gone, dry=False, submits=False)
    results, _ = make(tmp_path)
    (results / TRAIN / "model" / "weights").unlink()
    (tmp_path / "site.yaml").write_text(f"account: mine\nstorage: {{work: {gone.work}}}\n")
    monkeypatch.setenv("ABF_SITE", str(tmp_path / "site.yaml"))
    assert main(["keep", "--restore", "--results", str(results)]) == 3
    assert (results / TRAIN / MANIFEST).exists()


def test_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, _ = kept(tmp_path)
    (tmp_path / "site.yaml").write_text(f"account: mine\nstorage: {{work: {tmp_path}/work}}\n")
    monkeypatch.setenv("ABF_SITE", str(tmp_path / "site.yaml"))
    shutil.rmtree(results.parent)
    assert main(["keep", "--restore", "--results", str(results)]) == 0
    told = capsys.readouterr()
    assert "restored plan/s.json from" in told.err
    assert f"restored {TRAIN} (0.0 MB) from" in told.err
    # The study's ledger, report and ingest were never there, and are not missed.
    assert "3 of 6 planned directories restored, 0 lost" in told.out
