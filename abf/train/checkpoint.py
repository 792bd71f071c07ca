"""Rolling checkpoints: safetensors and JSON, written whole or not at all, newest valid one wins.

`{run_dir}/ckpt/step-00000123/` holds model.safetensors, optimizer.safetensors and state.json. The
last lists sizes and hashes of the others and carries a hash of itself, so that a file cut in half
or a flipped bit is found before a single weight is used. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from abf.errors import ArtifactError
from abf.files import fsync_path, sha256

FOLDER = "ckpt"
MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
FORMAT = 1


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk whose files were found whole."""

    path: Path
    state: dict[str, Any]
    """What the loop saved beside the tensors; `step` is the number of steps done."""

    @property
    def step(self) -> int:
        """Optimiser steps done."""
        return self.state["step"]

    def model(self) -> dict[str, Tensor]:
        """Parameters by name."""
        return load_file(self.path / MODEL)

    def optimizer(self) -> dict[str, Tensor]:
        """Optimiser state by parameter name and moment."""
        return load_file(self.path / OPTIMIZER)


def save(
    run_dir: Path,
    *,
    step: int,
    model: Mapping[str, Tensor],
    optimizer: Mapping[str, Tensor],
    state: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write a checkpoint, then remove all but the newest `keep`.

    Args:
        run_dir: the run's folder; one process writes into it at a time.
        step: optimiser steps done.
        model: parameters by name.
        optimizer: optimiser state by name.
        state: JSON values.
        keep: checkpoints that stay, this one included.

    Raises:
        ArtifactError: it could not be written (disk full, for example); the ones before stand.
    """
    folder = run_dir / FOLDER
    final = folder / f"step-{step:08d}"
    temporary = folder / f".{final.name}.{os.getpid()}.tmp"
    try:
        for leftover in folder.glob(".step-*.tmp"):  # of a writer that was killed
            shutil.rmtree(leftover)
        temporary.mkdir(parents=True)
        save_file(_plain(model), temporary / MODEL)
        save_file(_plain(optimizer), temporary / OPTIMIZER)
        files = {
            name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)}
            for name in (MODEL, OPTIMIZER)
        }
        content = {**state, "format": FORMAT, "step": step, "files": files}
        content["checksum"] = _checksum(content)
        (temporary / STATE).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        for name in (MODEL, OPTIMIZER, STATE):
            fsync_path(temporary / name)
        fsync_path(temporary)
        if final.exists():  # a damaged one of the same step
            shutil.rmtree(final)
        os.replace(temporary, final)
        fsync_path(folder)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise ArtifactError(
            f"the checkpoint of step {step} could not be written to {folder} ({error}); the "
            "checkpoints before it stand: mend the cause (free space on the disk, for example) "
            "and run the same command again"
        ) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _prune(folder, step=step, keep=keep)
    return final


def latest(run_dir: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and one phrase for each newer one that is not."""
    damaged: list[str] = []
    for path in reversed(_found(run_dir / FOLDER)):
        try:
            return Checkpoint(path, _check(path)), damaged
        except ArtifactError as error:
            damaged.append(str(error))
    return None, damaged


def clear(run_dir: Path) -> None:
    """Remove every checkpoint; for a run whose result is published."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def _found(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first (the names sort by step)."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _prune(folder: Path, *, step: int, keep: int) -> None:
    """Remove old checkpoints, and those beyond `step`: damaged ones that the run went back from."""
    found = _found(folder)
    current = folder / f"step-{step:08d}"
    beyond = [path for path in found if path.name > current.name]
    for path in beyond + [path for path in found if path not in beyond][:-keep]:
        shutil.rmtree(path)


def _check(path: Path) -> dict[str, Any]:
    """State of a checkpoint whose every byte is as written."""
    try:
        state = json.loads((path / STATE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ArtifactError(f"{path / STATE} cannot be read ({error})") from error
    if not isinstance(state, dict) or state.get("checksum") != _checksum(state):
        raise ArtifactError(f"{path / STATE} does not match its own checksum")
    if state["format"] != FORMAT:
        raise ArtifactError(
            f"{path / STATE} has format {state['format']}; this version reads {FORMAT}"
        )
    for name, entry in state["files"].items():
        file = path / name
        size = file.stat().st_size if file.exists() else 0
        if size != entry["bytes"]:
            raise ArtifactError(f"{file} has {size} bytes instead of {entry['bytes']}")
        if sha256(file) != entry["sha256"]:
            raise ArtifactError(f"{file} has changed since it was written (another sha256)")
    return state


def _checksum(state: Mapping[str, Any]) -> str:
    rest = {name: value for name, value in state.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _plain(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
