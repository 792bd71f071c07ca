"""Data parallelism over processes: each rank takes a slice of the rows, gradients are summed.

Ranks come from torchrun's environment (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT), or from RANK,
WORLD_SIZE and ABF_RENDEZVOUS, a file on a shared disk in which the first rank says where it listens
(no port has to be agreed on beforehand, so none can be taken). They talk by gloo, and GPUs among
themselves by NCCL.
Losses are divided by counts over all ranks before backward, so the summed gradient equals the
gradient of one process to float tolerance.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # pyright: ignore[reportPrivateImportUsage]

from abf.errors import ConfigError, RankError
from abf.files import write_json
from abf.model.device import CPU
from abf.train.heartbeat import Heartbeat

T = TypeVar("T")

RENDEZVOUS = "ABF_RENDEZVOUS"

TIMEOUT_S = 600.0
"""How long a rank waits for the others before it gives up; a dead peer is noticed at once."""


@dataclass(frozen=True)
class World:
    """This process among its peers; with one rank every operation does nothing."""

    rank: int = 0
    size: int = 1
    timeout_s: float = TIMEOUT_S
    device: torch.device = CPU
    """What this rank computes on."""

    @property
    def first(self) -> bool:
        """True on the rank that writes journals and checkpoints."""
        return self.rank == 0

    def share(self, rows: int, rank: int | None = None) -> slice:
        """A rank's part (this one's) of `rows` rows; parts differ by at most one row.

        Raises:
            ConfigError: there are fewer rows than ranks.
        """
        if rows < self.size:
            raise ConfigError(
                f"train.batch_rows is {rows}, but {self.size} ranks each need a row; raise it to "
                f"at least {self.size} or start fewer ranks"
            )
        rank = self.rank if rank is None else rank
        return slice(rows * rank // self.size, rows * (rank + 1) // self.size)

    def sum_(self, values: Tensor) -> Tensor:
        """Replace `values` by its sum over the ranks."""
        if self.size > 1:
            if values.device != CPU:
                # A device waits for its peers without a word; here a lost one is noticed.
                self.barrier()
            dist.all_reduce(values)
        return values

    def any(self, flag: bool) -> bool:
        """True on every rank when `flag` is true on one."""
        return bool(self.sum_(torch.tensor(int(flag)))) if self.size > 1 else flag

    def gather(self, value: T) -> list[T]:
        """Every rank's `value` (small, picklable), by rank."""
        if self.size == 1:
            return [value]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, value)
        return found

    def group(self) -> dist.ProcessGroup | None:
        """A group of all ranks for collectives of another thread; none for one rank alone."""
        if self.size == 1:
            return None
        timeout = timedelta(seconds=self.timeout_s)
        return dist.new_group(backend="gloo", timeout=timeout)  # pyright: ignore[reportReturnType]

    def barrier(self) -> None:
        """Wait until every rank is here."""
        if self.size > 1:
            dist.all_reduce(torch.zeros(()))  # gloo's, whatever the ranks compute on


@contextlib.contextmanager
def world(timeout_s: float = TIMEOUT_S, device: torch.device = CPU) -> Iterator[World]:
    """The ranks torchrun started, or this process alone; an open process group is used as it is.

    Args:
        timeout_s: seconds a rank waits for the others.
        device: what this rank computes on.

    Raises:
        ConfigError: torchrun's environment is incomplete; names what is missing.
        RankError: another rank died, or let this one wait too long; names it.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if dist.is_initialized():
        with _watched(timeout_s, device) as ranks:
            yield ranks
        return
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World(device=device)
        return
    timeout = timedelta(seconds=timeout_s)
    backend = "gloo" if device == CPU else f"cpu:gloo,{device.type}:nccl"
    meeting = os.environ.get(RENDEZVOUS)
    needed = ("RANK",) if meeting else ("RANK", "MASTER_ADDR", "MASTER_PORT")
    if missing := [name for name in needed if name not in os.environ]:
        raise ConfigError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']} but {', '.join(missing)} is not set; start "
            "through torchrun, or unset WORLD_SIZE"
        )
    if meeting:
        rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        store = _meet(Path(meeting), rank, size, timeout)
        dist.init_process_group(backend, timeout=timeout, store=store, rank=rank, world_size=size)
    else:
        dist.init_process_group(backend, timeout=timeout)
    try:
        with _watched(timeout_s, device) as ranks:
            yield ranks
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def _watched(timeout_s: float, device: torch.device) -> Iterator[World]:
    """The ranks of the open process group; a failure for which another is to blame names it."""
    ranks = World(dist.get_rank(), dist.get_world_size(), timeout_s, device)
    store = dist.distributed_c10d._get_default_store()
    with Heartbeat(store, ranks.rank, ranks.size) as heart:
        try:
            yield ranks
        except RuntimeError as error:  # what every collective raises
            blamed = heart.blame()
            heart.say("" if blamed else f"{type(error).__name__}: {error}")
            if blamed is None:
                raise
            raise RankError(
                f"{blamed}. Rank {ranks.rank} of {ranks.size} stopped with it; the last checkpoint "
                "stands, and the same command goes on from there"
            ) from error
        except Exception as error:
            heart.say(str(error) or type(error).__name__)
            raise


def _meet(path: Path, rank: int, size: int, timeout: timedelta) -> TCPStore:
    """The store all ranks share; the first one opens it on a free port and writes where.

    Raises:
        ConfigError: the first rank did not show up within `timeout`.
    """
    if rank == 0:
        store = TCPStore(
            socket.gethostname(), 0, size, is_master=True, timeout=timeout, wait_for_workers=False
        )
        write_json(path, {"host": socket.gethostname(), "port": store.port})
        return store
    began = time.monotonic()
    while not path.exists():
        if time.monotonic() - began > timeout.total_seconds():
            raise ConfigError(
                f"rank {rank}: {path} did not appear within {timeout}; the first rank has not "
                "started, or the ranks share no disk"
            )
        time.sleep(0.2)
    place = json.loads(path.read_text(encoding="utf-8"))
    return TCPStore(
        place["host"], place["port"], size, is_master=False, timeout=timeout, wait_for_workers=False
    )
