"""Finished stage directories without their stages, and deaths at any system call."""

from __future__ import annotations

import itertools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from abf.artifacts import file_entries
from abf.cluster.config import StorageConfig
from abf.files import sha256, write_json
from abf.keeping.store import Store
from abf.stage import DONE, declare
from abf.stages import CONFIG, MANIFEST, STAGES

TOKENS, TRAIN, DECODE = "tokenize/tokens-0a", "train/arm-s0-0b", "decode/arm-s0-0b/go.half-0c"
FILES = {
    TOKENS: {"tokens/train-00000.parquet": b"tokens " * 999},
    TRAIN: {"model/config.json": b"{}", "model/weights": b"w" * 5000, "metrics.parquet": b"m"},
    DECODE: {"samples.parquet": b"samples", "trace.arrows": b"trace"},
}  # fmt: skip
INPUTS = {TOKENS: {}, TRAIN: {"packed": TOKENS}, DECODE: {"train": TRAIN}}
EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.utime"}
"""Audit events that stand for a change of the disk."""


def attempt(number: int, state: str, job_id: str = "7") -> dict[str, object]:
    """A record of an attempt."""
    found = {"attempt": number, "job_id": job_id, "host": "node", "rule": "train", "run": "arm",
             "cores": 1, "gpus": 0, "start": 100.0, "state": state}  # fmt: skip
    if state == "RUNNING":
        return found | {"pid": 1, "pid_start": 1.0}
    return found | {"reason": "", "end": 160.0, "elapsed_s": 60.0}


def finish(
    results: Path, place: str, files: Mapping[str, bytes], inputs: Mapping[str, str]
) -> Path:
    """A stage directory as its stage leaves it; what is in it already stays."""
    directory, (stage, _, key) = results / place, place.partition("/")
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    document = {"stage": stage, "key": key, "config": {}, "inputs": dict(inputs), "resolved": {}}
    write_json(directory / CONFIG, document)
    (directory / DONE).mkdir(exist_ok=True)
    shutil.copy2(directory / CONFIG, directory / DONE / CONFIG)
    lines = [attempt(1, "RUNNING"), attempt(1, "COMPLETED")]
    (directory / "attempts.jsonl").write_text("".join(json.dumps(a) + "\n" for a in lines))
    manifest = {
        "stage": stage, "stage_version": STAGES[stage].version, "key": key,
        "config": sha256(directory / CONFIG), "inputs": {}, "counts": {},
        "started": 100.0, "seconds": 60.0,
        "files": file_entries(directory, STAGES[stage].payload),
    }  # fmt: skip
    write_json(directory / DONE / MANIFEST, manifest)
    declare(directory)
    return directory


def make(folder: Path) -> tuple[Path, Store]:
    """A results folder on scratch with three finished, planned directories, and its store."""
    results = folder / "scratch" / "results"
    for place, files in FILES.items():
        finish(results, place, files, INPUTS[place])
    write_json(results / "plan" / "s.json", {"study": "s", "stages": list(FILES), "cells": []})
    (folder / "work").mkdir()
    store = Store.of(results, StorageConfig(work=folder / "work"))
    assert store is not None
    return results, store


def tree(root: Path) -> dict[str, tuple[bytes, int]]:
    """Content and time of writing of all files; locks and lists left out."""
    out = {".lock", "results.json", "places.json"}
    return {
        path.relative_to(root).as_posix(): (path.read_bytes(), path.stat().st_mtime_ns)
        for path in root.rglob("*")
        if path.is_file() and path.name not in out
    }


def deaths(work: Callable[[], object]) -> Iterator[int]:
    """Do the work in a process that is gone, without a word, at its 1st, 2nd, 3rd ... change.

    Yields after each death; ends when the work got through.
    """
    for count in itertools.count(1):
        child = os.fork()
        if child == 0:
            sys.addaudithook(_dies_at(count))
            try:
                work()
            except BaseException as error:
                os.write(2, repr(error).encode())
                os._exit(1)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        assert code in (0, 9), code
        if code == 0:
            return
        yield count


def _dies_at(count: int) -> Callable[[str, tuple[object, ...]], None]:
    left = itertools.count(count, -1)

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & 3):
            return  # only read
        if event in EVENTS and next(left) == 1:
            os._exit(9)

    return hook
