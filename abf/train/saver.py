"""Writing checkpoints beside the training: it waits for a copy in memory, not for the disk.

Each rank writes its part through torch.distributed.checkpoint, in a thread with collectives of its
own. A checkpoint gets its name when every rank's part is on disk: whole or not at all. One is
written at a time; the next waits for it.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._hf_utils import CUSTOM_METADATA_KEY
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from abf.errors import ArtifactError
from abf.files import fsync_path
from abf.train.checkpoint import FOLDER, STATE, name_of, prune, sealed
from abf.train.parallel import World

T = TypeVar("T")


class _PartWriter(HuggingFaceStorageWriter):
    """DCP's safetensors writer, without its three copies of everything.

    They are made under the interpreter's lock, which the training needs: a checkpoint of 30M
    parameters held it up for longer than a `torch.save` would have. Writing and hashing in place
    leave the lock to others.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path), save_distributed=True)
        self.files: dict[str, dict[str, Any]] = {}
        """Size and hash of what this rank wrote."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this rank's part of every tensor into one file."""
        parts = [(item, planner.resolve_data(item)) for item in plan.items]
        tensors: dict[str, Tensor] = {}
        offsets: dict[str, dict[str, list[int]]] = {}
        for item, part in parts:
            assert isinstance(part, Tensor), item.index
            assert item.tensor_data is not None
            tensors[item.index.fqn] = part
            offsets[item.index.fqn] = {"saved_offsets": list(item.tensor_data.chunk.offsets)}
        if tensors:
            name = f"rank-{plan.storage_data['shard_index'] - 1:05}.safetensors"
            metadata = {"format": "pt", CUSTOM_METADATA_KEY: json.dumps(offsets)}
            self.files[name] = _write_safetensors(Path(self.path) / name, tensors, metadata)
        done: Future[list[WriteResult]] = Future()
        done.set_result([WriteResult(item.index, part.nbytes, None) for item, part in parts])  # pyright: ignore[reportAttributeAccessIssue]
        return done


def _write_safetensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> dict[str, Any]:
    """Write and flush a safetensors file of fp32 tensors; returns its size and hash."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        assert tensor.dtype == torch.float32, (name, tensor.dtype)
        start, end = end, end + tensor.nbytes
        entry = {"dtype": "F32", "shape": list(tensor.shape), "data_offsets": [start, end]}
        header[name] = entry
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    digest = hashlib.sha256()
    with open(path, "wb") as handle:
        arrays: list[Any] = [t.contiguous().view(-1).numpy() for t in tensors.values()]
        views = [array.data.cast("B") for array in arrays if array.size]
        for part in (struct.pack("<Q", len(text)), text, *views):
            handle.write(part)
            digest.update(part)
        handle.flush()
        os.fsync(handle.fileno())
        return {"bytes": handle.tell(), "sha256": digest.hexdigest()}


class Saver:
    """Writes the checkpoints of one run; every rank has one and calls the same methods."""

    def __init__(self, run_dir: Path, world: World, *, keep: int) -> None:
        """See the module.

        Args:
            run_dir: the run's folder, on a disk all ranks share; one run writes into it at a time.
            world: the ranks.
            keep: newest checkpoints that stay.
        """
        self.folder, self.keep = run_dir / FOLDER, keep
        self._group = world.group()
        self._first = world.first
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._done: tuple[int, Path] | None = None

    @property
    def failed(self) -> bool:
        """Whether `wait` would raise."""
        return self._error is not None

    def save(
        self,
        tensors: Mapping[str, Tensor],
        state: Mapping[str, Any],
        *,
        step: int,
        before: Callable[[], None] | None = None,
    ) -> None:
        """Copy, and return while the copy is written; waits for the save before.

        Args:
            tensors: by name, whole or sharded over the ranks.
            state: JSON values of the first rank.
            step: optimiser steps done.
            before: called on the first rank before the checkpoint stands.

        Raises:
            ArtifactError: the save before could not be written (disk full ...); see `wait`.
        """
        self.wait()
        staged = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}

        def write() -> None:
            try:
                self._done = (step, self._write(staged, state, step, before))
            except BaseException as error:  # for `wait` to raise
                self._error = error

        # A daemon: who asks a second time to be let go (Ctrl-C) is not held up by a slow disk.
        self._thread = threading.Thread(target=write, name=f"checkpoint {step}", daemon=True)
        self._thread.start()

    def poll(self) -> tuple[int, Path] | None:
        """Step and folder of a checkpoint that stands since the last call."""
        done, self._done = self._done, None
        return done

    def wait(self) -> None:
        """Return when the save under way stands.

        Raises:
            ArtifactError: it could not be written, on this rank or another; the ones before stand.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def _write(
        self,
        tensors: dict[str, Tensor],
        state: Mapping[str, Any],
        step: int,
        before: Callable[[], None] | None,
    ) -> Path:
        final = self.folder / name_of(step)
        temporary = self.folder / f".{final.name}.tmp"

        def begin() -> None:
            if self._first:
                for leftover in self.folder.glob(".step-*.tmp"):  # of a writer that was killed
                    shutil.rmtree(leftover)
                temporary.mkdir(parents=True)

        def publish(files: Mapping[str, Any]) -> None:
            if not self._first:
                return
            if before is not None:
                before()
            text = json.dumps(sealed(state, files, step), indent=1) + "\n"
            (temporary / STATE).write_text(text, encoding="utf-8")
            fsync_path(temporary / STATE)
            fsync_path(temporary)
            if final.exists():  # a damaged one of the same step
                shutil.rmtree(final)
            os.replace(temporary, final)
            fsync_path(self.folder)
            prune(self.folder, step=step, keep=self.keep)

        try:
            self._together(begin)
            writer = _PartWriter(temporary)
            alone = self._group is None
            save(tensors, storage_writer=writer, process_group=self._group, no_dist=alone)
            files = {k: v for part in self._together(lambda: writer.files) for k, v in part.items()}
            self._together(lambda: publish(files))
        except BaseException as error:
            if self._first:
                shutil.rmtree(temporary, ignore_errors=True)
            reason = _reason(error)
            if reason is None and isinstance(error, CheckpointException):
                raise next(iter(error.failures.values()))[0] from error
            if reason is None:
                raise
            raise ArtifactError(
                f"the checkpoint of step {step} could not be written to {self.folder} ({reason}); "
                "the checkpoints before it stand: mend the cause (free space on the disk, for "
                "example) and run the same command again"
            ) from error
        return final

    def _together(self, work: Callable[[], T]) -> list[T]:
        """What every rank's work gave; raises on all when it failed on one."""
        if self._group is None:
            return [work()]
        mine: tuple[T | None, OSError | None]
        try:
            mine = (work(), None)
        except OSError as error:
            mine = (None, error)
        found: list[Any] = [None] * dist.get_world_size(self._group)
        dist.all_gather_object(found, mine, group=self._group)
        failures = {rank: (error, None) for rank, (_, error) in enumerate(found) if error}
        if failures:
            raise CheckpointException("checkpoint", failures)  # pyright: ignore[reportArgumentType]
        return [value for value, _ in found]


def _reason(error: BaseException) -> str | None:
    """What kept a checkpoint from the disk; none when it is something else."""
    if isinstance(error, OSError):
        return str(error)
    if not isinstance(error, CheckpointException):
        return None
    reasons = {rank: _reason(cause) for rank, (cause, _) in error.failures.items()}
    if None in reasons.values():
        return None
    if len(error.failures) == 1 and 0 in reasons:
        return reasons[0]
    return "; ".join(f"rank {rank}: {reason}" for rank, reason in reasons.items())
