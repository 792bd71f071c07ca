"""Tile sizes of the `triton` back end, as data: by compute capability, head dimension and width.

A row is chosen by `choose`; `builds.py` compiles every row ahead of time for both targets.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

Architecture = Literal["sm_80", "sm_90", "default"]


class Tile(NamedTuple):
    """What a launch of one kernel chooses."""

    rows: int
    """Queries of a tile."""
    keys: int
    """Keys of a tile."""
    num_warps: int
    num_stages: int
    """Tiles under way or in use; with less than 3 the copies of a tile overlap with nothing."""


class Config(NamedTuple):
    """The three kernels' tiles."""

    forward: Tile
    dq: Tile
    dkv: Tile


# (architecture, D, bytes of an element). Chosen by what they compile to (`make kernels-report`):
# matrix instructions and asynchronous copies, no spill, and warps on a multiprocessor; where that
# left a choice, by the tiles that PyTorch's FlexAttention takes on the same GPU. Not measured on a
# GPU. "default" fits the 99 KiB of shared memory that a block has on consumer cards.
CONFIGS: dict[tuple[Architecture, int, int], Config] = {
    ("sm_80", 64, 2): Config(Tile(128, 64, 4, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3)),
    ("sm_80", 128, 2): Config(Tile(128, 64, 8, 3), Tile(64, 32, 4, 3), Tile(64, 64, 8, 3)),
    ("sm_90", 64, 2): Config(Tile(128, 64, 4, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    ("sm_90", 128, 2): Config(Tile(128, 64, 8, 3), Tile(128, 64, 8, 3), Tile(64, 128, 8, 3)),
    ("default", 64, 2): Config(Tile(64, 64, 4, 3), Tile(64, 32, 4, 3), Tile(32, 64, 4, 3)),
    ("default", 128, 2): Config(Tile(64, 32, 4, 3), Tile(64, 32, 4, 3), Tile(32, 64, 8, 3)),
    ("default", 64, 4): Config(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 8, 2)),
    ("default", 128, 4): Config(Tile(16, 32, 4, 2), Tile(16, 32, 8, 2), Tile(32, 16, 8, 2)),
}
# (architecture, D, kernel) that spill, and why they are shipped.
SPILLS = {
    ("sm_80", 128, "dkv"): "4 registers, stored and reloaded outside of the loops only",
    ("sm_90", 128, "dkv"): (
        "20 registers, about 15 reloads for each 64 x 128 scores; tiles of 32 queries spill none "
        "but read the keys from shared memory twice as often for each product"
    ),
}
# The interpreter's cost is per tile and operation.
INTERPRETED = Config(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1))


def choose(capability: tuple[int, int] | None, dim: int, itemsize: int) -> Config:
    """The row for a GPU's compute capability (none: the interpreter), D and an element's bytes."""
    if capability is None:
        return INTERPRETED
    named: Architecture = "default"
    if capability == (8, 0):
        named = "sm_80"
    elif capability == (9, 0):
        named = "sm_90"
    return CONFIGS.get((named, dim, itemsize)) or CONFIGS["default", dim, itemsize]
