"""Copies of finished directories: whole, verified, once; and killed at every step."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from abf.artifacts import damage
from abf.cli import main
from abf.cluster import disks
from abf.cluster.config import StorageConfig
from abf.errors import ArtifactError, ConfigError, LockError
from abf.files import sha256
from abf.keeping import store as store_module
from abf.keeping.store import Kept, Store
from abf.stages import MANIFEST
from tests.keeping.made import (
    DECODE,
    FILES,
    INPUTS,
    TOKENS,
    TRAIN,
    attempt,
    deaths,
    finish,
    make,
    tree,
)


def keep(store: Store) -> Kept:
    with store.held("test"):
        return store.keep(FILES)


def whole(root: Path) -> list[str]:
    """Kept places that count as finished; each must be whole."""
    found = [path.parent for path in root.rglob(MANIFEST) if path.parent.name != ".done"]
    for directory in found:
        assert directory.name.endswith(".tmp") or not damage(
            directory, json.loads((directory / MANIFEST).read_bytes())
        )
    return [d.relative_to(root).as_posix() for d in found if d.name[0] != "."]


def test_what_is_finished_is_copied_once_with_its_times(tmp_path: Path) -> None:
    results, store = make(tmp_path)
    (results / TRAIN / "ckpt").mkdir()
    (results / TRAIN / "ckpt" / "step").write_text("not kept")
    (results / TRAIN / ".staging").mkdir()
    (results / "train" / "begun").mkdir()
    assert keep(store).copied.keys() == FILES.keys()
    copies, here = tree(store.root), tree(results)
    assert {name for name in here if name not in copies} == {f"{TRAIN}/ckpt/step"}
    same = {name for name in here if name not in (f"{TRAIN}/ckpt/step",) and "attempts" not in name}
    assert all(here[name] == copies[name] for name in same)
    owner = json.loads((store.root / "results.json").read_text())
    assert owner["results"] == str(results)
    before = tree(store.root)
    assert keep(store) == Kept(there=3)
    assert tree(store.root) == before
    assert store.listed()[TRAIN]["sha256"] == sha256(results / TRAIN / MANIFEST)


def test_work_that_was_made_again_replaces_its_copy_and_attempts_are_only_added(
    tmp_path: Path,
) -> None:
    results, store = make(tmp_path)
    keep(store)
    # A purge took the records, and the work was done again.
    shutil.rmtree(results / TRAIN)
    finish(results, TRAIN, FILES[TRAIN] | {"metrics.parquet": b"other"}, INPUTS[TRAIN])
    again = [attempt(1, "RUNNING", "8"), attempt(1, "COMPLETED", "8")]
    (results / TRAIN / "attempts.jsonl").write_text("".join(json.dumps(a) + "\n" for a in again))
    assert keep(store).copied.keys() == {TRAIN}
    assert (store.root / TRAIN / "metrics.parquet").read_bytes() == b"other"
    lines = (store.root / TRAIN / "attempts.jsonl").read_text().splitlines()
    assert [json.loads(line)["job_id"] for line in lines] == ["7", "7", "8", "8"]


def test_what_is_not_as_its_manifest_says_is_not_copied(tmp_path: Path) -> None:
    results, store = make(tmp_path)
    (results / TRAIN / "model" / "weights").unlink()
    samples = results / DECODE / "samples.parquet"
    times = samples.stat()
    samples.write_bytes(b"sampled")
    os.utime(samples, ns=(times.st_atime_ns, times.st_mtime_ns))  # a bit flipped, nobody wrote
    done = keep(store)
    assert done.copied.keys() == {TOKENS}
    assert "weights is missing, its manifest says 5000 bytes" in done.faults[0]
    assert f"{samples} is not what its manifest says: it has another sha256" in done.faults[1]
    assert whole(store.root) == [TOKENS]


def test_a_copy_killed_at_any_step_goes_on(tmp_path: Path) -> None:
    results, store = make(tmp_path)
    died = 0
    for died in deaths(lambda: keep(store)):
        whole(store.root)
        if died % 2:  # else the next one, too, dies on its way on
            keep(store)
            assert sorted(whole(store.root)) == sorted(FILES)
            assert not list(store.root.rglob("*.tmp"))
            shutil.rmtree(store.root)
    assert died > 20
    assert sorted(whole(store.root)) == sorted(FILES)
    # And so does the exchange of a copy for a newer one, which is never without either.
    finish(results, TRAIN, {"metrics.parquet": b"other"}, INPUTS[TRAIN])
    for _ in deaths(lambda: keep(store)):
        found = whole(store.root)
        olds = [path.name for path in (store.root / "train").glob(".*.old")]
        assert TRAIN in found or olds == [f".{Path(TRAIN).name}.old"]
    assert (store.root / TRAIN / "metrics.parquet").read_bytes() == b"other"
    assert not list(store.root.rglob(".*.old"))


def test_a_target_without_room_is_refused_by_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    results, store = make(tmp_path)
    monkeypatch.setattr(store_module, "free_bytes", lambda path: 10**9)
    with pytest.raises(ArtifactError) as caught:
        keep(store)
    text = (
        "3 finished directories of 0.0 MB do not fit .*: 1.0 GB are free, and 1.1 GB must stay so"
    )
    assert caught.match(text)
    assert whole(store.root) == []
    monkeypatch.undo()
    (tmp_path / "work" / "colleague").write_bytes(b"x" * 95_000)
    small = StorageConfig(work=tmp_path / "work", work_quota_gb=0.0001)
    with pytest.raises(ArtifactError, match=r"0.1 MB of 0.1 MB are used \(counted over \d files"):
        keep(Store(store.root, results, small))
    assert whole(store.root) == []
    # What was finished is known by name all the same.
    assert store.listed().keys() == FILES.keys()


def test_where_copies_are_of_no_use_or_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results, store = make(tmp_path)
    assert Store.of(results, StorageConfig()) is None
    assert Store.of(results, StorageConfig(work=tmp_path)) is None
    elsewhere = StorageConfig(work=tmp_path / "work")
    assert elsewhere.kept(results) != elsewhere.kept(tmp_path / "other" / "scratch" / "results")
    with (
        store.held("one"),
        pytest.raises(LockError, match="in use by one, process"),
        store.held("two"),
    ):
        pass
    site = tmp_path / "site.yaml"
    monkeypatch.setenv("ABF_SITE", str(site))
    inside, link = results / "inside", tmp_path / "link"
    link.symlink_to(results)
    for storage, said in (
        ("{}", "storage.work of the site file is not set"),
        (f"{{work: {tmp_path}}}", "lies below storage.work"),
        (f"{{work: {tmp_path}/gone}}", f"storage.work={tmp_path}/gone is no folder"),
        ("{work: /proc}", "/proc/abf-results/"),
        (f"{{work: {results}}}", f"storage.work={results} ({results}/abf-results) lie in one"),
        (f"{{work: {inside}}}", f"storage.work={inside} ({inside}/abf-results) lie in one another"),
        (f"{{work: {link}/inside}}", f"storage.work={link}/inside ({inside}/abf-results) lie in"),
        (f"{{work: {link}, scratch: {tmp_path}}}", f"work={link} lies on scratch={tmp_path}"),
    ):
        site.write_text(f"account: mine\nstorage: {storage}\n")
        assert main(["keep", "--results", str(results)]) in (2, 3)
        kept = capsys.readouterr().err
        assert said in kept
        assert kept.count("\n") == 1
        if "scratch" in said or "one another" in said:  # the doctor says the same, word for word
            main(["doctor", "--results", str(results)])
            failed = [x for x in capsys.readouterr().out.splitlines() if x.startswith("FAIL")]
            assert any(kept.partition(": ")[2].strip() in line for line in failed), failed
    among = results.parents[1] / "work" / "abf-results" / "results"
    with pytest.raises(ConfigError, match="lie in one another"):
        elsewhere.kept(among)
    # What lies in the project area is kept as it is, unless that part of it is scratch.
    nested = StorageConfig(work=tmp_path, scratch=results.parent)
    assert nested.kept(tmp_path / "results") is None
    assert nested.kept(results) is not None
    site.write_text(f"account: mine\nstorage: {{work: {tmp_path}/work}}\n")
    assert main(["keep", "--results", str(results)]) == 0
    assert "3 directories of 0.0 MB copied to" in capsys.readouterr().out
    assert (store.root / "plan" / "s.json").exists()
    assert disks.spoken(2.5e9) == "2.5 GB"
