"""Settings of a site: one small file of one's own, never in the repository. Imports no torch."""

from __future__ import annotations

import hashlib
import re
from datetime import date
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, Field

from abf.base import ConfigModel
from abf.errors import ConfigError
from abf.files import real_path

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:=@+-]+$")]
"""A name as Slurm has them: no spaces, no quotes, nothing a shell would read."""
Minutes = Annotated[int, Field(ge=2, le=525_600)]
"""Time limit of a job; at most a year."""


def _named(path: Path) -> Path:
    if path == Path():
        raise ValueError("name a folder; empty would be the one of whoever runs a command")
    return path


Folder = Annotated[Path, AfterValidator(_named)]
"""A folder of a site file."""
KEPT = "abf-results"
"""Folder below `storage.work` for copies of finished stage directories."""


class LaunchConfig(ConfigModel):
    """How a training is spread over a cluster; it changes no result beyond the last bits."""

    nodes: int = Field(default=1, ge=1, le=100_000)
    """Full nodes."""
    ranks_per_node: int = Field(default=4, ge=1, le=1024)
    """Processes a node, one a GPU; a node's cores are divided among them."""
    minutes: Minutes = 1440
    """Time limit of one job; a longer training requeues itself."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """What one rank's device can do at best in the precision of the training, in 1e12 operations a
    second (an A100 312 in bf16): utilisation (MFU) is counted from it. None: measured at the
    start."""


class BudgetConfig(ConfigModel):
    """What a study may spend; it changes no result."""

    cap_node_hours: float | None = Field(default=None, gt=0)
    """Most node-hours of the whole study, what it shares with other studies included. None: only
    the allocation of the site file binds."""


class NodeConfig(ConfigModel):
    """One full node, the unit that is paid for."""

    cores: int = Field(default=32, ge=1, le=10_000)
    gpus: int = Field(default=4, ge=0, le=1000)
    memory_mb: int = Field(default=494_000, ge=1, le=10**9)
    billing: float = Field(default=32.0, gt=0)
    """What the scheduler bills for a full node: node-hours = elapsed hours * billing / this."""


class AllocationConfig(ConfigModel):
    """What was granted."""

    node_hours: float = Field(gt=0)
    start: date
    end: date
    """Last day included."""

    def model_post_init(self, context: object) -> None:
        if self.end < self.start:
            raise ValueError(f"end={self.end} is before start={self.start}")


class StorageConfig(ConfigModel):
    """Where files live, and what the site does to them."""

    work: Folder | None = None
    """Project area, kept until after the project; finished artifacts are copied here at the end
    of every run and restored from here."""
    work_quota_gb: float | None = Field(default=None, gt=0)
    scratch: Folder | None = None
    """Fast area whose files are deleted by age."""
    purge_days: int | None = Field(default=None, ge=1, le=36_500)
    """Days after which scratch deletes a file that nobody read."""
    keep_days: int = Field(default=60, ge=0, le=36_500)
    """Days since its last writing after which `abf gc` offers a directory that no plan names."""

    def model_post_init(self, context: object) -> None:
        if self.work is not None and self.on_scratch(self.work):
            raise ValueError(
                f"work={self.work} lies on scratch={self.scratch}, where copies are deleted by age "
                "like what they are copies of: name a folder that is kept, or leave `work` out"
            )

    def on_scratch(self, path: Path) -> bool:
        """Whether a folder lies where files are deleted by age, through links or not."""
        return self.scratch is not None and real_path(path).is_relative_to(real_path(self.scratch))

    def kept(self, results: Path) -> Path | None:
        """Folder below `work` for what a results folder finished; none where that is no help.

        What lies in the project area already, and not on scratch, is kept as it is. The name is
        that of the results and a hash of where they lie.

        Raises:
            ConfigError: results and copies lie in one another.
        """
        if self.work is None:
            return None
        place, work, copies = real_path(results), real_path(self.work), real_path(self.work / KEPT)
        if copies.is_relative_to(place) or place.is_relative_to(copies):
            raise ConfigError(
                f"the results folder {results} ({place}) and the folder of copies of storage.work="
                f"{self.work} ({copies}) lie in one another: name another folder in the site file "
                "or with --results"
            )
        if place.is_relative_to(work) and not self.on_scratch(results):
            return None
        spoken = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(place.parts[-2:])).strip("_-/")
        digest = hashlib.sha256(str(place).encode()).hexdigest()[:8]
        return self.work / KEPT / f"{spoken}-{digest}"

    def not_kept(self, results: Path) -> str:
        """Why a results folder has no folder of copies."""
        if self.work is None:
            return (
                "storage.work of the site file is not set: name the folder that is kept for years"
            )
        return f"{results} lies below storage.work={self.work} already: nothing is to be copied"


class SiteConfig(ConfigModel):
    """A site: who pays, where jobs go, what a node is."""

    cluster: Word = "leonardo"
    """Name in the ledger."""
    account: Word
    """Slurm account; ABF_ACCOUNT overrides it."""
    partition: Word = "boost_usr_prod"
    """For everything that computes."""
    qos: Word = "normal"
    serial_partition: Word = "lrd_all_serial"
    """For the driver: free, with a network, at most `serial_minutes` a job."""
    serial_qos: Word = "normal"
    serial_minutes: Minutes = 240
    max_minutes: Minutes = 1440
    """Longest job of `partition` under `qos`; a longer training requeues itself."""
    signal_seconds: int = Field(default=300, ge=10, le=86_400)
    """How long before its end a job is told to save and requeue (Slurm may be a minute early)."""
    poll_seconds: float = Field(default=30.0, gt=0, le=86_400)
    """Between two looks at the queue, all waiting rules of a driver together."""
    unknown_seconds: float = Field(default=600.0, gt=0, le=86_400)
    """How long an id that neither queue nor records know is waited for."""
    setup: tuple[str, ...] = ()
    """Shell lines at the start of every job, such as `module load cuda/12.3`."""
    node: NodeConfig = NodeConfig()
    allocation: AllocationConfig | None = None
    storage: StorageConfig = StorageConfig()
