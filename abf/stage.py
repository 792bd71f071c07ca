"""Run one stage: lock, attempt record, staging folder, publish, manifest; used by every command."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from abf.artifacts import file_entries, publish, read_manifest
from abf.files import lock, read_if_json, sha256, write_json, write_text
from abf.stages import CONFIG, MANIFEST, STAGES, stage_dir
from abf.track.attempts import attempt

STAGING = ".staging"
DONE = ".done"
"""Folder of the finished manifest, and of the configuration it was made with. Snakemake deletes
declared outputs before it runs a rule again, after a killed driver for example; what lies here it
does not know, so finished work is not lost."""


class StageRun:
    """What a stage's code sees: an empty `staging` folder and its own directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        """Final home; undeclared files that survive a retry (checkpoints, journal) live here."""
        self.staging = directory / STAGING
        """Empty folder; payload names written here are published on success."""
        self.counts: dict[str, Any] = {}
        """Figures for the manifest."""
        self.extra: dict[str, Any] = {}
        """Fields for the attempt's closing record (energy, for example)."""


def git_sha() -> str:
    """Commit of the checkout the code runs from, `+` when it has changes, or `unknown`."""
    root = Path(__file__).parent
    git = ["git", "-C", str(root)]
    try:
        sha = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, timeout=20
        )
        dirty = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    if sha.returncode:
        return "unknown"
    return sha.stdout.strip() + ("+" if dirty.stdout.strip() else "")


def versions() -> dict[str, str]:
    """Versions that decide what the code does."""
    names = ("torch", "numpy", "pyarrow", "tokenizers", "datasets", "transformers")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


Inputs = Mapping[str, Path | Sequence[Path]]


def content_hash(manifest: Mapping[str, Any]) -> str:
    """Of what was made, not of when: work that was lost and made again alike is the same."""
    made = [manifest[name] for name in ("stage", "stage_version", "config")]
    text = json.dumps([*made, _contents(manifest["files"])], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def hash_inputs(inputs: Inputs) -> dict[str, list[dict[str, str]]]:
    """Path, manifest hash and content hash of every input, by name.

    Raises:
        ArtifactError: one is unfinished or damaged.
    """
    hashes: dict[str, list[dict[str, str]]] = {}
    for label, paths in inputs.items():
        for path in [paths] if isinstance(paths, Path) else paths:
            content = content_hash(read_manifest(path))
            manifest = stage_dir(path) / MANIFEST
            hashes.setdefault(label, []).append(
                {
                    "path": os.path.relpath(manifest.parent),
                    "sha256": sha256(manifest),
                    "content": content,
                }
            )
    return hashes


def _same_inputs(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether two answers of `hash_inputs` tell of the same content, in the same order."""

    def same(one: Mapping[str, str], other: Mapping[str, str]) -> bool:
        return one["sha256"] == other["sha256"] or one.get("content") == other["content"]

    return len(before) == len(now) and all(
        len(one) == len(other) and all(map(same, one, other))
        for one, other in zip(before.values(), now.values(), strict=True)
    )


def is_finished(name: str, directory: Path, *, inputs: Inputs, config: Path | None) -> bool:
    """Whether `directory` holds this very work, finished and whole, declared or not.

    Raises:
        ArtifactError: an input is unfinished or damaged, whatever lies here: nothing is submitted
            that could only find that out.
    """
    spec, done, made_from = STAGES[name], directory / DONE / MANIFEST, hash_inputs(inputs)
    if not spec.pure or not done.exists():
        return False
    manifest = read_if_json(done)
    return (
        manifest is not None
        and manifest["stage_version"] == spec.version
        and manifest["config"] == (None if config is None else sha256(config))
        and _same_inputs(manifest["inputs"], made_from)
        and all((directory / part).exists() for part in spec.payload)
        and _contents(manifest["files"]) == _contents(file_entries(directory, spec.payload))
    )


def _contents(files: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    return {name: entry["sha256"] for name, entry in files.items()}


def declare(directory: Path) -> None:
    """Give the finished manifest its declared name: a link to the same file, in one step."""
    temporary = directory / f".{MANIFEST}.{os.getpid()}.tmp"
    temporary.unlink(missing_ok=True)
    os.link(directory / DONE / MANIFEST, temporary)
    os.utime(temporary)  # newer than the inputs, or Snakemake would ask for it again and again
    os.replace(temporary, directory / MANIFEST)
    temporary.unlink(missing_ok=True)  # renaming a link to the file that has the name does nothing


@contextlib.contextmanager
def stage(
    name: str,
    out: Path,
    *,
    inputs: Inputs,
    config: Path | None,
    cores: int = 1,
    declared: bool = True,
) -> Iterator[StageRun]:
    """Check the inputs, let the body write into `staging`, publish, and write the manifest.

    Args:
        name: key of `STAGES`.
        out: stage directory, or the path of its manifest.
        inputs: upstream stage directories (or manifests) by name; each must be finished and whole.
        config: `config.json` of this stage.
        cores: processor cores given to the job, for the ledger.
        declared: give the manifest its declared name; a job on a cluster leaves that to the rule
            that waits for it.

    Raises:
        ArtifactError: an input is unfinished or damaged; the body wrote another payload.
        LockError: another process works on this stage directory.
    """
    spec, directory = STAGES[name], stage_dir(out)
    with lock(directory, f"abf {name}"):
        began = time.time()
        run = StageRun(directory)
        with attempt(directory, rule=name, run=directory.name, cores=cores) as extra:
            hashes = hash_inputs(inputs)
            # A staging folder is somebody's who was killed: we hold the lock, so it is nobody's.
            shutil.rmtree(run.staging, ignore_errors=True)
            run.staging.mkdir()
            try:
                yield run
                # Until here a finished stage stays finished: a failing rerun costs nothing.
                for stale in (directory / MANIFEST, directory / DONE / MANIFEST):
                    stale.unlink(missing_ok=True)
                publish(run.staging, directory, spec.payload)
            finally:
                shutil.rmtree(run.staging, ignore_errors=True)
            extra.update(run.extra)
            manifest = {
                "stage": name,
                "stage_version": spec.version,
                "key": directory.name,
                "config": None if config is None else sha256(config),
                "inputs": hashes,
                "files": file_entries(directory, spec.payload),
                "counts": run.counts,
                "git_sha": git_sha(),
                "versions": versions(),
                "started": began,
                "seconds": time.time() - began,
                "core_seconds": sum(os.times()[:4]),
            }
            if config is not None:
                # The manifest has its hash; `abf why` has to name the keys that differ.
                write_text(directory / DONE / CONFIG, config.read_text(encoding="utf-8"))
            write_json(directory / DONE / MANIFEST, manifest)
            if declared:
                declare(directory)
