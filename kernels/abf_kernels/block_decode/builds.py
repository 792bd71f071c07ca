"""What the Triton back end launches, to be compiled ahead of time (`abf_kernels.ahead`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from abf_kernels.ahead import Build, targets
from abf_kernels.block_decode import triton as kernels
from abf_kernels.block_decode.configs import ROWS, SHARE, merging, parse
from abf_kernels.tuning import Row

WHOLE = ("table", "lengths", "queries", "own", "seen")
OTHERS = ("N", "H", "parts", "pages_each", "page_size")


NAMES = {2: "bf16", 4: "fp32"}


def builds(rows: Iterable[Row] | None = None) -> Iterator[Build]:
    """A part of a request's keys, and the merge of parts, of the rows (default: all)."""
    for row in ROWS.values() if rows is None else rows:
        dtype, dim = NAMES[row.itemsize], row.dim
        for target in targets(row.architecture):
            sizes = {"R": 4, "D": dim, "SHARE": SHARE, **parse(row).launch(dim)}
            warps, stages = sizes.pop("num_warps"), sizes.pop("num_stages")
            strides = [p.name for p in kernels._attend.params if p.name.startswith("stride_")]
            arguments = {
                **dict.fromkeys(("q", "k", "v", "keys", "values"), f"*{dtype}:16"),
                **dict.fromkeys(WHOLE, "*i32:16"),
                **dict.fromkeys(("out", "lse"), "*fp32:16"),
                "scale": "fp32",
                **dict.fromkeys(OTHERS, "i32"),
                **dict.fromkeys(strides, "i32:16"),
                "HAS_HISTORY": True,
                "HAS_OWN": True,
                **sizes,
            }
            name = f"{dtype} D={dim} ({row.architecture})"
            yield Build(
                "block_decode", f"part {name}", kernels._attend, arguments, target, warps, stages
            )
            merged = {"R": 4, "D": dim, "SHARE": SHARE, **merging(dim)}
            warps, stages = merged.pop("num_warps"), merged.pop("num_stages")
            merged |= dict.fromkeys(("parts_out", "parts_lse", "lse"), "*fp32:16")
            merged |= dict.fromkeys(("lengths", "queries"), "*i32:16")
            merged |= {"out": f"*{dtype}:16", "N": "i32", "H": "i32"}
            yield Build(
                "block_decode", f"merge {name}", kernels._gather, merged, target, warps, stages
            )
