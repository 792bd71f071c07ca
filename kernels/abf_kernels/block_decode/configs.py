"""Tile sizes of the Triton kernels by compute capability: the reader of configs.json.

Chosen by what compiles without spills and fits the shared memory (tests/kernels), not by speed; the
defaults need 48 KiB of shared memory.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch

from abf_kernels import tuning

SHARE = 512
"""Cached keys of one split. A constant, so that what a request is answered does not depend on the
machine nor on its neighbours; 32k of context are 64 splits a kv head."""


class Config(NamedTuple):
    """Tile of rows (queries x heads of a group) x columns (keys)."""

    rows: int
    columns: int
    warps: int
    stages: int

    def launch(self, dim: int) -> dict[str, Any]:
        """Keywords of a launch."""
        return {
            "BLOCK_M": self.rows,
            "BLOCK_N": self.columns,
            "BLOCK_D": _width(dim),
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def merging(dim: int) -> dict[str, Any]:
    """Keywords of the launch that merges parts."""
    return {"BLOCK_M": 16, "BLOCK_D": _width(dim), "num_warps": 4, "num_stages": 1}


def _width(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


FILE = Path(__file__).with_name("configs.json")
ROWS = tuning.read(FILE)


def parse(row: tuning.Row) -> Config:
    """The tile of a row."""
    return Config(**row.tiles["attend"])


CONFIGS = {key: parse(row) for key, row in ROWS.items()}
"""By (architecture, largest head dim, bytes of an element)."""


def choose(device: torch.device, dtype: torch.dtype, dim: int) -> Config:
    """The configuration for the tensors of a call."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    widest = min(most for _, most, _ in CONFIGS if dim <= most)
    named = tuning.architecture(capability), widest, dtype.itemsize
    return CONFIGS.get(named) or CONFIGS[tuning.DEFAULT, widest, dtype.itemsize]
