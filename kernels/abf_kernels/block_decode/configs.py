"""Tile sizes of the Triton kernels by compute capability. Data: nothing here was timed on a GPU.

Chosen by what compiles without spills and fits the shared memory (tests/kernels), not by speed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

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


NARROW = {
    80: {64: Config(32, 64, 4, 3), 128: Config(32, 64, 4, 3)},
    90: {64: Config(64, 64, 4, 3), 128: Config(64, 64, 4, 2)},
}
"""For bfloat16 and float16, by capability (80 = A100, 90 = H100 and H200) and largest head dim."""
SAFE = {64: Config(32, 32, 4, 1), 128: Config(16, 32, 4, 1), 256: Config(16, 16, 4, 1)}
"""For float32, larger heads and every other GPU (48 KiB of shared memory do)."""


def choose(device: torch.device, dtype: torch.dtype, dim: int) -> Config:
    """The configuration for the tensors of a call."""
    fitting = SAFE
    if device.type == "cuda" and dtype != torch.float32:
        major, minor = torch.cuda.get_device_capability(device)
        fitting = SAFE | NARROW.get(10 * major + minor, {})
    return next(fitting[most] for most in sorted(fitting) if dim <= most)
