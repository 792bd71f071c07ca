"""Tile sizes of the `triton` back end: by compute capability, head dimension and width.

A row is chosen by `choose`; `builds.py` compiles every row ahead of time for both targets.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from abf_kernels import tuning


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


# By (architecture, D, bytes of an element). Rows that were not measured were chosen by what they
# compile to (`make kernels-report`): matrix instructions and asynchronous copies, no spill, and
# warps on a multiprocessor; where that left a choice, by the tiles that PyTorch's FlexAttention
# takes on the same GPU. "default" fits the 99 KiB of shared memory of a block on consumer cards.
FILE = Path(__file__).with_name("configs.json")
ROWS = tuning.read(FILE)


def parse(row: tuning.Row) -> Config:
    """The three kernels' tiles of a row."""
    return Config(**{kernel: Tile(**tile) for kernel, tile in row.tiles.items()})


CONFIGS = {key: parse(row) for key, row in ROWS.items()}
# The interpreter's cost is per tile and operation.
INTERPRETED = Config(Tile(64, 64, 4, 1), Tile(64, 64, 4, 1), Tile(64, 64, 4, 1))


def choose(capability: tuple[int, int] | None, dim: int, itemsize: int) -> Config:
    """The row for a GPU's compute capability (none: the interpreter), D and an element's bytes."""
    if capability is None:
        return INTERPRETED
    named = tuning.architecture(capability), dim, itemsize
    return CONFIGS.get(named) or CONFIGS[tuning.DEFAULT, dim, itemsize]
