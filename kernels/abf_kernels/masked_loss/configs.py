"""Tile sizes of the Triton kernels by compute capability: the reader of configs.json.

Chosen by what compiles without spills and fits the shared memory (tests/kernels), not by speed.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import torch

from abf_kernels import tuning

SLICE = 1 << 25
"""Elements of the gradient's slice [R, tokens] that are held at once."""


class Config(NamedTuple):
    """Tile of rows x columns (tokens), `width` of the model's width at a time."""

    rows: int
    columns: int
    width: int
    warps: int
    stages: int

    def launch(self) -> dict[str, int]:
        """Keywords of a launch."""
        return {
            "BLOCK_R": self.rows,
            "BLOCK_V": self.columns,
            "BLOCK_D": self.width,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


FILE = Path(__file__).with_name("configs.json")
ROWS = tuning.read(FILE)


def parse(row: tuning.Row) -> Config:
    """The tile of a row."""
    return Config(**row.tiles["logits"])


CONFIGS = {key: parse(row) for key, row in ROWS.items()}
"""By (architecture, 0, bytes of an element)."""


def choose(device: torch.device, dtype: torch.dtype) -> Config:
    """The configuration for the tensors of a call."""
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    named = tuning.architecture(capability), 0, dtype.itemsize
    return CONFIGS.get(named) or CONFIGS[tuning.DEFAULT, 0, dtype.itemsize]
