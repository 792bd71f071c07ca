"""Tile sizes of the Triton kernels by compute capability. Data: nothing here was timed on a GPU.

Chosen by what compiles without spills and fits the shared memory (tests/kernels), not by speed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

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


NARROW = {80: Config(64, 64, 64, 4, 3), 90: Config(64, 64, 64, 4, 3)}
"""For bfloat16 and float16, by capability (80 = A100, 90 = H100 and H200)."""
SAFE = Config(32, 32, 32, 4, 2)
"""For float32, and for every other GPU."""


def choose(device: torch.device, dtype: torch.dtype) -> Config:
    """The configuration for the tensors of a call."""
    if device.type != "cuda" or dtype == torch.float32:
        return SAFE
    major, minor = torch.cuda.get_device_capability(device)
    return NARROW.get(10 * major + minor, SAFE)
