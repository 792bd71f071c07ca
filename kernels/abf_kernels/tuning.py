"""Tile sizes as data: `configs.json` beside an operator's `configs.py`, rows by architecture.

`configs.py` reads them and chooses, `builds.py` compiles every one ahead of time, and
`python -m benchmarks.gpu --tune` measures others and writes the fastest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

DEFAULT = "default"
"""The architecture whose rows serve every GPU without rows of its own."""
COMPILED = "chosen from compilation, not measured on a GPU"


@dataclass(frozen=True)
class Row:
    """The tiles of an operator's kernels for one architecture and kind of tensor."""

    architecture: str
    """"sm_80" (A100), "sm_90" (H100, H200) or `DEFAULT`."""
    dim: int
    """Largest head dim that it serves; 0 for an operator without heads."""
    itemsize: int
    """Bytes of an element."""
    tiles: dict[str, dict[str, int]]
    """By kernel: what a launch chooses."""
    spills: dict[str, str]
    """Why a kernel is shipped although it spills registers; others must not."""
    source: str
    """`COMPILED`, or "measured on DEVICE" and when."""

    @property
    def key(self) -> tuple[str, int, int]:
        """What a row is found by."""
        return self.architecture, self.dim, self.itemsize


def read(path: Path) -> dict[tuple[str, int, int], Row]:
    """The rows of a file, by key.

    Raises:
        ValueError: a row with other fields, sizes below 1, a key twice, or without a default.
    """
    rows: dict[tuple[str, int, int], Row] = {}
    for entry in json.loads(path.read_text(encoding="utf-8")):
        if set(entry) != {field.name for field in fields(Row)}:
            raise ValueError(f"{path}: a row has the fields {sorted(entry)}")
        row = Row(**entry)
        if row.key in rows:
            raise ValueError(f"{path}: two rows for {row.key}")
        sizes = [size for tile in row.tiles.values() for size in tile.values()]
        if not sizes or not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(
                f"{path}: tiles of {row.key} must be whole numbers above 0: {row.tiles}"
            )
        if unknown := set(row.spills) - set(row.tiles):
            raise ValueError(f"{path}: {row.key} has no kernels {sorted(unknown)} that could spill")
        rows[row.key] = row
    for architecture, dim, itemsize in rows:
        if (DEFAULT, dim, itemsize) not in rows:
            raise ValueError(f"{path}: {(architecture, dim, itemsize)} has no default beside it")
    return rows


def write(path: Path, rows: Iterable[Row]) -> None:
    """Replace a file, a line for each row."""
    lines = ",\n".join(json.dumps(asdict(row)) for row in rows)
    beside = path.with_name(path.name + ".new")
    beside.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    os.replace(beside, path)


def architecture(capability: tuple[int, int] | None) -> str:
    """The name of a compute capability; `DEFAULT` without a GPU."""
    return DEFAULT if capability is None else "sm_{}{}".format(*capability)
