"""Rolling checkpoints on disk: found, checked, read, pruned; `abf.train.saver` writes them.

`{run_dir}/ckpt/step-00000123/` holds a safetensors file of each rank's part and state.json. The
tensors are laid out by torch.distributed.checkpoint (DCP), which reads them into any other number
of ranks. state.json lists sizes and hashes of the files and carries a hash of itself, so that a
file cut in half or a flipped bit is found before a single weight is used. No pickle anywhere.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from abf.errors import ArtifactError, ResumeError
from abf.files import sha256
from abf.train.parallel import World

FOLDER = "ckpt"
STATE = "state.json"
FORMAT = 2

# One process alone is a case of ours, not an accident.
warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)


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

    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Fill tensors, or this rank's shards of them, in place; every rank calls it."""
        reader = HuggingFaceStorageReader(str(self.path))
        load(dict(tensors), storage_reader=reader, no_dist=not dist.is_initialized())


def latest(run_dir: Path, world: World | None = None) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and one phrase for each newer one that is not.

    Every rank calls it; they share the work of reading, and find the same.

    Raises:
        ResumeError: the ranks see different checkpoints.
    """
    world = World() if world is None else world
    found = list(reversed(_found(run_dir / FOLDER)))
    if len(set(world.gather(tuple(path.name for path in found)))) > 1:
        raise ResumeError(
            f"the ranks see different checkpoints in {run_dir}; it must be on a disk they share"
        )
    damaged: list[str] = []
    for path in found:
        try:
            state, problem = _check(path, world), None
        except ArtifactError as error:
            state, problem = {}, str(error)
        problems = [text for text in world.gather(problem) if text is not None]
        if not problems:
            return Checkpoint(path, state), damaged
        damaged.append("; ".join(dict.fromkeys(problems)))
    return None, damaged


def clear(run_dir: Path) -> None:
    """Remove every checkpoint; for a run whose result is published."""
    shutil.rmtree(run_dir / FOLDER, ignore_errors=True)


def prune(folder: Path, *, step: int, keep: int) -> None:
    """Remove old checkpoints, and those beyond `step`: damaged ones that the run went back from."""
    found = _found(folder)
    current = folder / name_of(step)
    beyond = [path for path in found if path.name > current.name]
    for path in beyond + [path for path in found if path not in beyond][:-keep]:
        shutil.rmtree(path)


def name_of(step: int) -> str:
    """Folder name of a checkpoint; names sort by step."""
    return f"step-{step:08d}"


def sealed(state: Mapping[str, Any], files: Mapping[str, Any], step: int) -> dict[str, Any]:
    """Content of state.json: what the loop saves, and what the files must be."""
    content = {**state, "format": FORMAT, "step": step, "files": dict(sorted(files.items()))}
    return {**content, "checksum": _checksum(content)}


def _found(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def _check(path: Path, world: World) -> dict[str, Any]:
    """State of a checkpoint; every byte of this rank's part of the files is as written."""
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
    for name, entry in list(state["files"].items())[world.rank :: world.size]:
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
