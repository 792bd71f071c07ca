"""Stages: nothing half-done under a final name, locks with a name on them, attempts on record."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from abf import files
from abf.artifacts import TOKENS, read_manifest, read_table, write_table
from abf.cli import main
from abf.errors import ArtifactError, Interrupted, LockError
from abf.files import atomic_path, lock, write_json
from abf.stage import declare, is_finished, stage
from abf.stages import STAGES
from abf.track.attempts import read_attempts

ROW = {
    "doc_id": ["a"],
    "token_ids": [[1]],
    "char_start": [[0]],
    "byte_start": [[0]],
    "n_bytes": [1],
}


def make(directory: Path, text: str = "x") -> Path:
    """A finished `mlflow` stage directory (its payload is one file)."""
    with stage("mlflow", directory, inputs={}, config=None) as run:
        (run.staging / "ingested.json").write_text(text)
        run.counts = {"n": 1}
    return directory


def test_a_finished_stage_has_a_manifest_that_lists_what_it_wrote(tmp_path: Path) -> None:
    directory = make(tmp_path / "one")
    manifest = read_manifest(directory, "mlflow")
    assert manifest["files"]["ingested.json"]["bytes"] == 1
    assert manifest["counts"] == {"n": 1}
    assert [a["state"] for a in read_attempts(directory)] == ["RUNNING", "COMPLETED"]
    assert not (directory / ".staging").exists()


def test_a_failing_rerun_leaves_what_was_finished(tmp_path: Path) -> None:
    directory = make(tmp_path / "one", "first")
    with pytest.raises(ZeroDivisionError), stage("mlflow", directory, inputs={}, config=None) as r:
        (r.staging / "ingested.json").write_text("second")
        _ = 1 / 0
    assert (directory / "ingested.json").read_text() == "first"
    assert read_manifest(directory)["counts"] == {"n": 1}
    last = read_attempts(directory)[-1]
    assert (last["attempt"], last["state"]) == (2, "FAILED")
    assert "ZeroDivisionError" in last["reason"]


def test_a_changed_byte_is_found_and_a_copy_is_none(tmp_path: Path) -> None:
    directory = make(tmp_path / "one", "first")
    shutil.copytree(directory, tmp_path / "copy", copy_function=shutil.copyfile)
    assert read_manifest(tmp_path / "copy")["counts"] == {"n": 1}
    (directory / "ingested.json").write_text("fIrst")
    with pytest.raises(ArtifactError, match=r"one/ingested\.json was changed after it was written"):
        read_manifest(directory)


def finish(directory: Path, text: str = "x", inputs: dict[str, Path] | None = None) -> Path:
    """A finished `score` directory: a pure stage."""
    with stage("score", directory, inputs=inputs or {}, config=None) as run:
        (run.staging / "scores.parquet").write_text(text)
        (run.staging / "documents.parquet").write_text(text)
    return directory


def is_done(directory: Path, inputs: dict[str, Path] | None = None) -> bool:
    return is_finished("score", directory, inputs=inputs or {}, config=None)


def test_finished_work_whose_declaration_was_deleted_is_declared_again(tmp_path: Path) -> None:
    upstream = make(tmp_path / "up")
    directory = finish(tmp_path / "one", inputs={"up": upstream})
    before = read_manifest(directory)
    (directory / "manifest.json").unlink()  # as Snakemake does before it runs a rule again
    assert is_done(directory, {"up": upstream})
    declare(directory)
    declare(directory)  # a second time: the name is that file's already
    assert not list(directory.glob(".*.tmp"))
    assert read_manifest(directory) == before
    assert (directory / "manifest.json").stat().st_ino == (
        directory / ".done/manifest.json"
    ).stat().st_ino


@pytest.mark.parametrize("change", ["payload", "input", "version", "missing"])
def test_other_work_is_not_declared(
    tmp_path: Path, change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream = make(tmp_path / "up")
    directory = finish(tmp_path / "one", inputs={"up": upstream})
    if change == "payload":
        (directory / "scores.parquet").write_text("y")
    elif change == "input":
        make(tmp_path / "up", "other")
    elif change == "version":
        spec = STAGES["score"]
        monkeypatch.setitem(STAGES, "score", replace(spec, version=spec.version + 1))
    else:
        (directory / "documents.parquet").unlink()
    assert not is_done(directory, {"up": upstream})


def test_an_input_that_was_lost_and_made_again_alike_repeats_nothing(tmp_path: Path) -> None:
    upstream = make(tmp_path / "up", "same")
    directory = finish(tmp_path / "one", inputs={"up": upstream})
    before = (upstream / "manifest.json").read_bytes()
    shutil.rmtree(upstream)
    make(tmp_path / "up", "same")
    assert (upstream / "manifest.json").read_bytes() != before
    assert is_done(directory, {"up": upstream})
    assert not is_done(directory, {"up": upstream, "more": upstream})


def test_a_stage_that_reads_the_world_is_never_done(tmp_path: Path) -> None:
    directory = make(tmp_path / "one")
    assert not is_finished("mlflow", directory, inputs={}, config=None)


def test_an_interrupt_is_no_failure(tmp_path: Path) -> None:
    with pytest.raises(Interrupted), stage("mlflow", tmp_path, inputs={}, config=None):
        raise Interrupted("stopped by SIGTERM")
    assert read_attempts(tmp_path)[-1]["state"] == "INTERRUPTED"


def test_missing_payload_is_named(tmp_path: Path) -> None:
    with (
        pytest.raises(ArtifactError, match=r"wrote no ingested\.json"),
        stage("mlflow", tmp_path, inputs={}, config=None),
    ):
        pass


@pytest.mark.parametrize("damage", ["truncate", "delete", "manifest"])
def test_damaged_input_is_refused_by_name(tmp_path: Path, damage: str) -> None:
    upstream = make(tmp_path / "up", "content")
    if damage == "truncate":
        os.truncate(upstream / "ingested.json", 3)
    elif damage == "delete":
        (upstream / "ingested.json").unlink()
    else:
        (upstream / "manifest.json").write_text("{")
    with (
        pytest.raises(
            ArtifactError, match=r"ingested\.json (has 3|is missing)|manifest\.json is damaged"
        ),
        stage("mlflow", tmp_path / "down", inputs={"up": upstream}, config=None),
    ):
        pass


def test_truncated_and_wrong_tables_are_named(tmp_path: Path) -> None:
    path = tmp_path / "tokens.parquet"
    write_table(path, pa.table(ROW), TOKENS)
    assert read_table(path, TOKENS).num_rows == 1
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ArtifactError, match=r"tokens\.parquet cannot be read"):
        read_table(path, TOKENS)
    pq.write_table(pa.table({"doc_id": ["a"], "ids": [1]}), path)
    with pytest.raises(ArtifactError, match="ids: found int64, expected nothing"):
        read_table(path, TOKENS)
    with pytest.raises(ArtifactError, match="is missing"):
        read_table(tmp_path / "no.parquet", TOKENS)


def test_disk_full_leaves_the_old_file_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "value.json"
    write_json(path, 1)

    def full(_path: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "fsync_path", full)
    with pytest.raises(ArtifactError, match=r"disk full while writing .*value\.json"):
        write_json(path, 2)
    assert json.loads(path.read_text()) == 1
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_full_disk(tmp_path: Path) -> None:
    """/dev/full refuses every write, as a full file system does."""
    with pytest.raises(ArtifactError, match="disk full"), atomic_path(tmp_path / "f") as temporary:
        temporary.symlink_to("/dev/full")
        temporary.write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_the_second_writer_is_told_who_holds_the_lock(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom abf.files import lock\n"
        "with lock(pathlib.Path(sys.argv[1]), 'abf train'):\n"
        "    print('held', flush=True); time.sleep(600)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with (
            pytest.raises(LockError, match=f"abf train, process {holder.pid} on "),
            lock(tmp_path, "x"),
        ):
            pass
    finally:
        holder.kill()
        holder.wait()
    with lock(tmp_path, "next"):  # a killed holder leaves nothing behind
        pass


def test_a_killed_attempt_stays_on_record(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib\nfrom abf.stage import stage\n"
        "with stage('mlflow', pathlib.Path(sys.argv[1]), inputs={}, config=None) as run:\n"
        "    (run.staging / 'ingested.json').write_text('half')\n"
        "    print('working', flush=True); time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "working\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "ingested.json").exists()
    assert [a["state"] for a in read_attempts(tmp_path)] == ["RUNNING"]
    with open(tmp_path / "attempts.jsonl", "a") as handle:
        handle.write('{"attempt": 1, "torn')  # the power went while it was writing
    make(tmp_path, "whole")
    assert [(a["attempt"], a["state"]) for a in read_attempts(tmp_path)] == [
        (1, "RUNNING"),
        (2, "RUNNING"),
        (2, "COMPLETED"),
    ]


def test_the_heartbeat_tells_how_long_a_killed_attempt_lasted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abf.track.attempts.HEARTBEAT_SECONDS", 0.01)
    with stage("mlflow", tmp_path, inputs={}, config=None) as run:
        (run.staging / "ingested.json").touch()
        first = (tmp_path / ".heartbeat").stat().st_mtime_ns
        while (tmp_path / ".heartbeat").stat().st_mtime_ns == first:
            time.sleep(0.01)


def test_nothing_is_submitted_whose_inputs_are_not_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    results = tmp_path / "results"
    (tmp_path / "site.yaml").write_text("account: a\n")
    (tmp_path / "run.yaml").write_text("study: s\n")
    monkeypatch.setenv("ABF_SITE", str(tmp_path / "site.yaml"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no scheduler: asking it would be another message
    assert main(["plan", str(tmp_path / "run.yaml"), "--results", str(results)]) == 0
    (directory,) = (results / "train").iterdir()
    (init,) = (results / "convert").iterdir()
    for command in (["train", str(directory), "--submit"], ["train", str(directory)]):
        assert main(command) == ArtifactError.exit_code
        assert f"{os.path.relpath(init)} is unfinished: it has no manifest.json" in (
            capsys.readouterr().err
        )
        submitted, attempts = (directory / "job.json").exists(), read_attempts(directory)
        assert not submitted
    # What a rule's own process refuses is on record: nobody tries it again.
    assert [a["state"] for a in attempts] == ["RUNNING", "FAILED"]
