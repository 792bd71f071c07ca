"""The CSV of a run: a row is on disk as soon as it is known."""

from __future__ import annotations

import csv
import dataclasses
import os
import platform
import re
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from abf.stage import git_sha
from benchmarks.gpu.timing import Figure

FIELDS = tuple(field.name for field in dataclasses.fields(Figure))
SECONDS = "seconds of "
"""The last row of a finished job."""


def machine(device: torch.device) -> dict[str, str]:
    """What every row says of where it was measured."""
    import triton

    found = {
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "git_sha": git_sha(),
    }
    if device.type != "cuda":
        return {"device": platform.processor() or "cpu", "capability": "", "driver": ""} | found
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.split()[0]
    major, minor = torch.cuda.get_device_capability(device)
    name = torch.cuda.get_device_name(device)
    return {"device": name, "capability": f"sm_{major}{minor}", "driver": driver} | found


def file_of(folder: Path, device: str) -> Path:
    """`gpu_nvidia_h100_80gb_hbm3.csv`, for example."""
    return folder / f"gpu_{re.sub(r'[^a-z0-9]+', '_', device.lower()).strip('_')}.csv"


class Table:
    """Writes rows to a file that takes its name when the run is whole; prints them.

    What an interrupted run measured stays beside it, under `.partial`. The same code on the same
    machine goes on from there: jobs that were finished are kept, rows of others are dropped.
    """

    def __init__(self, path: Path, common: Mapping[str, str]) -> None:
        self.path, self.common = path, common
        self.partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fields = [*FIELDS, "job", *common]
        found = [row for row in read(self.partial) if common.items() <= row.items()]
        finished = {row["job"] for row in found if row["figure"] == SECONDS + row["job"]}
        self.rows: list[Mapping[str, object]] = [row for row in found if row["job"] in finished]
        self._write(self.partial)

    def has(self, job: str) -> bool:
        """Whether a job was finished, now or by the run that this one continues."""
        return any(row["figure"] == SECONDS + job for row in self.rows)

    def add(self, row: Figure, job: str = "") -> None:
        """Print a row of a job and put it on the disk."""
        print(row, flush=True)
        self.rows.append(dataclasses.asdict(row) | {"job": job} | dict(self.common))
        self._write(self.partial)

    def finish(self, job: str, seconds: float) -> None:
        """All rows of a job are there; it took that long, compilation included."""
        self.add(Figure(SECONDS + job, seconds, seconds, seconds, "s"), job)

    def done(self, *, whole: bool = True) -> Path:
        """Give the file its name; unless `whole`, with the rows of other jobs that it had."""
        if not whole:
            jobs = {row["job"] for row in self.rows}
            self.rows = [row for row in read(self.path) if row["job"] not in jobs] + self.rows
            self._write(self.partial)
        self.partial.replace(self.path)
        return self.path

    def _write(self, path: Path) -> None:
        beside = path.with_name(path.name + ".new")
        with open(beside, "w", newline="") as handle:
            writer = csv.DictWriter(handle, self.fields, restval="", extrasaction="ignore")
            writer.writeheader()
            writer.writerows(self.rows)
            handle.flush()
            os.fsync(handle.fileno())
        beside.replace(path)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a file; none where there is none."""
    if not path.exists():
        return []
    with open(path, newline="") as handle:
        return list(csv.DictReader(handle))
