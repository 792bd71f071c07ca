"""What may be deleted, what never is, and deletions killed at every step."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import pytest

from abf.cli import main
from abf.cluster import slurm
from abf.cluster.config import StorageConfig
from abf.errors import ClusterError
from abf.files import lock, write_json
from abf.keeping.store import Store
from abf.keeping.waste import find, plan_places, planned_places, remove, stage_places
from abf.stages import MANIFEST
from abf.track.attempts import job_id
from tests.keeping.made import DECODE, FILES, TOKENS, TRAIN, attempt, deaths, make, tree

OLD_DAYS = 100


@pytest.fixture(autouse=True)
def no_scheduler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever this machine has."""
    monkeypatch.setattr(slurm, "available", lambda: False)


def age(folder: Path, days: float = OLD_DAYS) -> None:
    then = time.time() - days * 86400
    for path in folder.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time(), then))


def retire(results: Path, *places: str) -> None:
    """Take places out of the only plan."""
    stages = [place for place in FILES if place not in places]
    write_json(results / "plan" / "s.json", {"study": "s", "stages": stages, "cells": []})


def waste(results: Path, store: Store | None = None) -> dict[str, str]:
    """Path -> why."""
    planned = planned_places(results, store)
    found = find(results, store, planned=planned, keep_days=60)
    return {str(one.path): one.why for one in found}


def delete(results: Path, store: Store | None = None) -> list[str]:
    """Everything that may go; what was said of what stayed."""
    planned = planned_places(results, store)
    found = list(find(results, store, planned=planned, keep_days=60))
    return [trouble for _, trouble in remove(found, results) if trouble]


def test_checkpoints_of_finished_trainings_only(tmp_path: Path) -> None:
    results, _ = make(tmp_path)
    for place in (TRAIN, "train/begun-0d"):
        (results / place / "ckpt" / "step-00000001").mkdir(parents=True)
        (results / place / "ckpt" / "step-00000001" / "state.json").write_text("{}" * 50)
    begun = {"stage": "train", "key": "begun-0d", "config": {}, "inputs": {}}
    write_json(results / "train/begun-0d" / "config.json", begun)
    plan = {"study": "s", "stages": [*FILES, "train/begun-0d"], "cells": []}
    write_json(results / "plan" / "s.json", plan)
    age(results)
    place = str(results / TRAIN / "ckpt")
    assert waste(results) == {place: "checkpoints of a finished training"}
    # Its checkpoint is the quickest way back to a model that is gone.
    weights = results / TRAIN / "model" / "weights"
    content, times = weights.read_bytes(), weights.stat()
    weights.unlink()
    assert waste(results) == {}
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert delete(results) == []
    assert not Path(place).exists()
    assert (results / "train/begun-0d" / "ckpt").exists()
    assert waste(results) == {}


def test_what_dead_attempts_left_and_never_what_a_living_one_holds(tmp_path: Path) -> None:
    results, _ = make(tmp_path)
    (results / TRAIN / ".staging").mkdir()
    (results / TRAIN / ".staging" / "half").write_text("half")
    (results / TOKENS / ".restoring").mkdir()
    left = "left of an attempt that died"
    paths = [str(results / TOKENS / ".restoring"), str(results / TRAIN / ".staging")]
    assert waste(results) == dict.fromkeys(paths, left)
    (results / TRAIN / "attempts.jsonl").write_text(
        json.dumps(attempt(2, "RUNNING", job_id())) + "\n"
    )
    (results / TRAIN / ".heartbeat").touch()  # on another host
    assert waste(results) == {paths[0]: left}
    (results / TRAIN / "attempts.jsonl").write_text("")
    with lock(results / TRAIN, "abf train"):
        (said,) = delete(results)
    assert "is in use by abf train" in said
    assert Path(paths[1]).exists()
    assert not Path(paths[0]).exists()


def test_a_job_in_the_queue_protects_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, _ = make(tmp_path)
    retire(results, TRAIN, DECODE)
    age(results)
    assert waste(results).keys() == {str(results / TRAIN), str(results / DECODE)}
    monkeypatch.setattr(slurm, "available", lambda: True)

    def queue(**changes: str) -> None:
        fields = dict.fromkeys(slurm.QueuedJob.__dataclass_fields__, "") | {"state": "RUNNING"}
        monkeypatch.setattr(slurm, "queue", lambda: [slurm.QueuedJob(**fields | changes)])

    queue(job_id="1", comment=f"abf {TRAIN}".replace("/", " ", 1))
    assert waste(results).keys() == {str(results / DECODE)}
    write_json(results / DECODE / "job.json", {"job_id": "2"})
    queue(job_id="2")
    assert waste(results).keys() == {str(results / TRAIN)}

    def away() -> list[slurm.QueuedJob]:
        raise ClusterError("squeue does not answer")

    monkeypatch.setattr(slurm, "queue", away)
    with pytest.raises(ClusterError, match="does not answer"):
        waste(results)


def test_what_no_plan_names_goes_after_its_days_and_leaves_its_records(tmp_path: Path) -> None:
    results, store = make(tmp_path)
    with store.held("test"):
        store.keep(FILES)
    write_json(results / TRAIN / "job.json", {"job_id": "7"})
    (results / TRAIN / ".heartbeat").touch()
    retire(results, TRAIN, DECODE)
    with store.held("test"):
        store.keep([])
    age(results, 59)
    age(store.root, 59)
    assert waste(results, store) == {}
    age(results)
    age(store.root)
    records = (results / TRAIN / "attempts.jsonl").read_bytes()
    found = waste(results, store)
    assert found.keys() == {
        str(root / p) for root in (results, store.root) for p in (TRAIN, DECODE)
    }
    assert "no plan names it, last written 100 days ago (storage.keep_days: 60)" in found.popitem()
    tokens = tree(results / TOKENS)
    assert delete(results, store) == []
    assert waste(results, store) == {}
    names = {path.name for path in (results / TRAIN).iterdir()}
    assert names == {"attempts.jsonl", "job.json", ".heartbeat", "config.json", ".lock"}
    assert (results / TRAIN / "attempts.jsonl").read_bytes() == records
    job = json.loads((results / TRAIN / "job.json").read_text())
    assert job == {"job_id": "7", "ended": "DELETED"}  # planned again, it is not waited for
    assert (store.root / DECODE / "attempts.jsonl").exists()
    assert not (store.root / DECODE / MANIFEST).exists()
    assert store.listed().keys() == {TOKENS}
    assert tree(results / TOKENS) == tokens
    assert not [path for path in results.joinpath(".gc").iterdir() if path.name != ".lock"]


def test_a_plan_among_the_copies_protects_too(tmp_path: Path) -> None:
    results, store = make(tmp_path)
    with store.held("test"):
        store.keep(FILES)
    shutil.rmtree(results / "plan")
    age(results)
    age(store.root)
    assert waste(results, store) == {}
    assert len(waste(results, None)) == 3


def test_a_directory_that_was_planned_and_never_tried_goes_whole(tmp_path: Path) -> None:
    results, _ = make(tmp_path)
    document = {"stage": "train", "key": "other-0e", "config": {}, "inputs": {}}
    write_json(results / "train/other-0e" / "config.json", document)
    (results / "train" / "a stranger's").mkdir()
    age(results)
    assert waste(results).keys() == {str(results / "train/other-0e")}
    delete(results)
    assert not (results / "train/other-0e").exists()
    assert (results / "train" / "a stranger's").exists()


def test_a_deletion_killed_at_any_step_goes_on(tmp_path: Path) -> None:
    results, store = make(tmp_path)
    with store.held("test"):
        store.keep(FILES)
    backup = tmp_path / "backup"
    (results / TRAIN / "ckpt").mkdir()
    (results / TRAIN / "ckpt" / "state").write_text("s")
    retire(results, TRAIN, DECODE)
    with store.held("test"):
        store.keep_books()
    age(results)
    age(store.root)
    shutil.copytree(tmp_path / "scratch", backup / "scratch", copy_function=shutil.copy2)
    shutil.copytree(tmp_path / "work", backup / "work", copy_function=shutil.copy2)
    died = 0
    for died in deaths(lambda: delete(results, store)):
        for root in (results, store.root):
            for path in root.glob("[!.]*/**/manifest.json"):
                directory = path.parent.parent if path.parent.name == ".done" else path.parent
                present = {p.name for p in directory.iterdir()}
                place = directory.relative_to(root).as_posix()
                assert {name.partition("/")[0] for name in FILES[place]} <= present
            for place in (TRAIN, DECODE):
                assert (root / place / "attempts.jsonl").exists()
        if died % 2:
            delete(results, store)
            assert waste(results, store) == {}
            for name in ("scratch", "work"):
                shutil.rmtree(tmp_path / name)
                shutil.copytree(backup / name, tmp_path / name, copy_function=shutil.copy2)
    assert died > 20
    assert waste(results, store) == {}
    assert stage_places(results) == [TOKENS, TRAIN, DECODE]


def test_the_command_lists_first_and_deletes_only_with_yes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, _ = make(tmp_path)
    site = tmp_path / "site.yaml"
    site.write_text(f"account: mine\nstorage: {{work: {tmp_path}/work, keep_days: 30}}\n")
    monkeypatch.setenv("ABF_SITE", str(site))
    (results / TRAIN / "ckpt").mkdir()
    (results / TRAIN / "ckpt" / "state").write_bytes(b"x" * 2_500_000)
    assert main(["gc", "--results", str(results)]) == 0
    said = capsys.readouterr().out
    assert f"2.5 MB       1 files  {results / TRAIN}/ckpt: checkpoints of a finished" in said
    assert said.endswith("2.5 MB may go; nothing was deleted: `--yes` deletes it\n")
    assert main(["gc", "--results", str(results), "--yes"]) == 0
    assert "2.5 MB of 2.5 MB deleted" in capsys.readouterr().out
    assert main(["gc", "--results", str(results)]) == 0
    assert capsys.readouterr().out == "0.0 MB may go\n"
    shutil.rmtree(results / "plan")
    assert main(["gc", "--results", str(results)]) == 3
    assert "everything would look unwanted" in capsys.readouterr().err
    assert plan_places({"stages": [], "study": "s"}) == ["ledger/s", "report/s", "mlflow/s"]
    assert StorageConfig().keep_days == 60
