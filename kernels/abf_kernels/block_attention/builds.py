"""What block attention ships to GPUs, as `abf_kernels.ahead` compiles it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from abf_kernels.ahead import TARGETS, Build, targets
from abf_kernels.block_attention.configs import ROWS, Tile, parse
from abf_kernels.block_attention.triton_kernels import dkv_kernel, dq_kernel, forward_kernel
from abf_kernels.block_attention.triton_plan import CHUNK, bounds_kernel, touching_kernel
from abf_kernels.tuning import Row

NAMES = {"bf16": 2, "fp32": 4}  # fp16 compiles to the same figures as bf16: not repeated
POINTERS = dict.fromkeys(("lse", "delta"), "fp32")
POINTERS |= dict.fromkeys(("ranges", "bounds", "entries", "counts"), "i32")
SCALARS = dict.fromkeys(("scale", "grad_scale"), "fp32")
SCALARS |= dict.fromkeys(("H", "R", "M", "N", "tiles", "max_entries"), "i32")


def builds(rows: Iterable[Row] | None = None) -> Iterator[Build]:
    """The rows (default: all) for each type they serve; the plan's kernels for their tiles."""
    plans = set()
    for row in ROWS.values() if rows is None else rows:
        config = parse(row)
        for dtype in (name for name, size in NAMES.items() if size == row.itemsize):
            for target in targets(row.architecture):
                for kernel, tile in (
                    (forward_kernel, config.forward),
                    (dq_kernel, config.dq),
                    (dkv_kernel, config.dkv),
                ):
                    yield _build(kernel, tile, row, dtype, target)
                plans |= {(target, tile.rows) for tile in config}
    for target, rows in sorted(plans):
        arguments = {"ranges": "*i32:16", "bounds": "*i32:16", "ROWS": rows}
        arguments |= dict.fromkeys(("M", "N", "tiles"), "i32")
        yield Build("block_attention", f"bounds {rows}", bounds_kernel, arguments, target, 4, 3)
    for target in TARGETS:
        arguments = dict.fromkeys(("bounds", "entries", "counts"), "*i32:16") | {"CHUNK": CHUNK}
        arguments |= dict.fromkeys(("N", "query_tiles", "key_tiles", "keys"), "i32")
        yield Build("block_attention", "touching", touching_kernel, arguments, target, 4, 3)


def _build(kernel: Any, tile: Tile, row: Row, dtype: str, target: int) -> Build:
    constants = {
        "D": row.dim,
        "ROWS": tile.rows,
        "KEYS": tile.keys,
        "KEEP": dtype != "fp32",
        "PRECISION": "tf32x3" if dtype == "fp32" else "tf32",
    }
    arguments = {}
    for argument in kernel.arg_names:
        if argument in constants:
            arguments[argument] = constants[argument]
        elif argument.startswith("stride_"):
            arguments[argument] = "i32:16"
        else:
            arguments[argument] = SCALARS.get(argument) or f"*{POINTERS.get(argument, dtype)}:16"
    name = kernel.__name__.removesuffix("_kernel")
    return Build(
        "block_attention",
        f"{name} {dtype} D={row.dim} ({row.architecture})",
        kernel,
        arguments,
        target,
        tile.num_warps,
        tile.num_stages,
        spills=row.spills.get(name, ""),
    )
