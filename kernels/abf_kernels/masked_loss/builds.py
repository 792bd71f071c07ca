"""What the Triton back end launches, to be compiled ahead of time (`abf_kernels.ahead`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from abf_kernels.ahead import Build, targets
from abf_kernels.masked_loss import triton as kernels
from abf_kernels.masked_loss.configs import ROWS, parse
from abf_kernels.tuning import Row

SIZES = {"R": "i32", "V": "i32", "d": "i32:16", "stride_h": "i32:16", "stride_m": "i32:16"}
NAMES = {2: "bf16", 4: "fp32"}


def builds(rows: Iterable[Row] | None = None) -> Iterator[Build]:
    """Of the rows (default: all) the loss, predictions of 1 and 4 tokens, the gradient's slope."""
    for row in ROWS.values() if rows is None else rows:
        dtype = NAMES[row.itemsize]
        for target in targets(row.architecture):
            launch = parse(row).launch()
            warps, stages = launch.pop("num_warps"), launch.pop("num_stages")

            sums = {"sums": "*fp32:16", "candidates": "*fp32:16", "ids": "*i32:16", "share": "i32"}
            floats = {"weight": "*fp32:16", "lse": "*fp32:16", "out": f"*{dtype}:16"}
            cases: list[tuple[str, Any, dict[str, Any]]] = [
                ("slope", kernels._slope, floats | {"first": "i32", "width": "i32"})
            ]
            for case, top, K in (("loss", False, 1), ("top 1", True, 1), ("top 4", True, 4)):
                flags = {"HAS_TARGET": True, "HAS_TOP": top, "K": K}
                cases.append((case, kernels._sweep, sums | flags))
            operands = {"hidden": f"*{dtype}:16", "matrix": f"*{dtype}:16", "target": "*i64:16"}
            for case, kernel, more in cases:
                arguments = operands | SIZES | launch | more
                name = f"{case} {dtype} ({row.architecture})"
                yield Build("masked_loss", name, kernel, arguments, target, warps, stages)
