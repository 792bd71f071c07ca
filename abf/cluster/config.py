"""Settings of a site: one small file of one's own, never in the repository. Imports no torch."""

from __future__ import annotations

import hashlib
import os
import re
from datetime import date
from pathlib import Path
from typing import Annotated

from pydantic import Field

from abf.base import ConfigModel

Word = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:=@+-]+$")]
"""A name as Slurm has them: no spaces, no quotes, nothing a shell would read."""
KEPT = "abf-results"
"""Folder below `storage.work` for copies of finished stage directories."""


class LaunchConfig(ConfigModel):
    """How a training is spread over a cluster; it changes no result beyond the last bits."""

    nodes: int = Field(default=1, ge=1)
    """Full nodes."""
    ranks_per_node: int = Field(default=4, ge=1)
    """Processes a node, one a GPU; a node's cores are divided among them."""
    minutes: int = Field(default=1440, ge=2)
    """Time limit of one job; a longer training requeues itself."""


class BudgetConfig(ConfigModel):
    """What a study may spend; it changes no result."""

    cap_node_hours: float | None = Field(default=None, gt=0)
    """Most node-hours of the whole study, what it shares with other studies included. None: only
    the allocation of the site file binds."""


class NodeConfig(ConfigModel):
    """One full node, the unit that is paid for."""

    cores: int = Field(default=32, ge=1)
    gpus: int = Field(default=4, ge=0)
    memory_mb: int = Field(default=494_000, ge=1)
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

    work: Path | None = None
    """Project area, kept until after the project; finished artifacts are copied here at the end
    of every run and restored from here."""
    work_quota_gb: float | None = Field(default=None, gt=0)
    scratch: Path | None = None
    """Fast area whose files are deleted by age."""
    purge_days: int | None = Field(default=None, ge=1)
    """Days after which scratch deletes a file that nobody read."""
    keep_days: int = Field(default=60, ge=0)
    """Days since its last writing after which `abf gc` offers a directory that no plan names."""

    def kept(self, results: Path) -> Path | None:
        """Folder below `work` for what a results folder finished; none where that is no help.

        Its name is that of the results and a hash of where they lie.
        """
        place = os.path.realpath(results)
        if self.work is None or Path(place).is_relative_to(os.path.realpath(self.work)):
            return None
        spoken = re.sub(r"[^A-Za-z0-9._-]+", "_", "-".join(Path(place).parts[-2:])).strip("_-/")
        return self.work / KEPT / f"{spoken}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"


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
    serial_minutes: int = Field(default=240, ge=2)
    max_minutes: int = Field(default=1440, ge=2)
    """Longest job of `partition` under `qos`; a longer training requeues itself."""
    signal_seconds: int = Field(default=300, ge=10)
    """How long before its end a job is told to save and requeue (Slurm may be a minute early)."""
    poll_seconds: float = Field(default=30.0, gt=0)
    """Between two looks at the queue, all waiting rules of a driver together."""
    unknown_seconds: float = Field(default=600.0, gt=0)
    """How long an id that neither queue nor records know is waited for."""
    setup: tuple[str, ...] = ()
    """Shell lines at the start of every job, such as `module load cuda/12.3`."""
    node: NodeConfig = NodeConfig()
    allocation: AllocationConfig | None = None
    storage: StorageConfig = StorageConfig()
