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

    What an interrupted run measured stays beside it, under `.partial`.
    """

    def __init__(self, path: Path, common: Mapping[str, str]) -> None:
        self.path, self.common = path, common
        self.partial = path.with_name(path.name + ".partial")
        path.parent.mkdir(parents=True, exist_ok=True)
        self.fields = [*FIELDS, *common]
        self._write(dict(zip(self.fields, self.fields, strict=True)), "w")

    def add(self, row: Figure) -> None:
        """Print a row and put it on the disk."""
        print(row, flush=True)
        self._write(dataclasses.asdict(row) | dict(self.common), "a")

    def _write(self, row: Mapping[str, object], mode: str) -> None:
        with open(self.partial, mode, newline="") as handle:
            csv.DictWriter(handle, self.fields).writerow(row)
            handle.flush()
            os.fsync(handle.fileno())

    def done(self) -> Path:
        """Give the file its name."""
        self.partial.replace(self.path)
        return self.path
