"""Every shipped configuration compiles for the A100 and the H100, where none is interpreted."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from abf_kernels import tuning
from abf_kernels.ahead import STACK

ROOT = Path(__file__).parents[2]
COMPILES = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
COMPILES["PYTHONPATH"] = os.pathsep.join(
    [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
).rstrip(os.pathsep)


PROBES = """
import json, sys, torch
from dataclasses import replace
from abf_kernels.ahead import compile_ahead
from abf_kernels.block_attention.api import block_attention
from abf_kernels.block_attention.builds import builds

def refusal(call, *given, **named):
    try: call(*given, **named)
    except ValueError as error: return str(error)

kernels = {build.kernel for build in builds()}
build = next(builds())
q, ranges = torch.zeros(1, 1, 3, 64), torch.zeros(1, 3, 4, dtype=torch.int32)
json.dump({
    "fixed": sorted({p.name for kernel in kernels for p in kernel.params
                     if p.is_constexpr or not p.do_not_specialize}),
    "on a cpu": refusal(block_attention, q, q, q, ranges, backend="triton"),
    "not its arguments": refusal(
        compile_ahead, replace(build, arguments={**build.arguments, "Q": "i32"})),
}, sys.stdout)
"""


def python(*arguments: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env=COMPILES | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def matrix_instructions(row: dict[str, str]) -> int:
    """Those that a row should have: of sm_90 `wgmma`, unless another tile was measured faster."""
    narrow_on_hopper = row["target"] == "sm_90" and "bf16" in row["case"]
    path = ROOT / "kernels" / "abf_kernels" / row["operator"] / "configs.json"
    measured = {
        entry.architecture for entry in tuning.read(path).values()
        if entry.source != tuning.COMPILED
    }  # fmt: skip
    if narrow_on_hopper and not any(f"({name})" in row["case"] for name in measured):
        return int(row["wgmma"])
    return int(row["mma_sync"]) + int(row["wgmma"])


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """Of every shipped build, compiled here and now: a cache of earlier runs would hide that it no
    longer compiles with this compiler, and what compiling costs."""
    folder = tmp_path_factory.mktemp("ahead")
    path = folder / "rows.csv"
    python("-m", "abf_kernels.ahead", str(path), TRITON_CACHE_DIR=str(folder / "cache"))
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def told() -> dict[str, Any]:
    """What kernels that are not interpreted say, of one process."""
    return json.loads(python("-c", PROBES))


def test_nothing_spills_unless_it_says_why_and_everything_can_be_launched(
    rows: list[dict[str, str]],
) -> None:
    """Which spill is known of the version that tiles were chosen on; any other gives out registers
    in its own way (README.md), but not many bytes of a thread."""
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    pinned = f"triton=={rows[0]['triton']}" in (ROOT / "envs" / "cuda.txt").read_text().split()
    for row in rows:
        assert not pinned or (int(row["stack_bytes"]) > 0) == bool(row["spills"]), row
        assert int(row["stack_bytes"]) <= (STACK if pinned else 2 * STACK), row
        assert int(row["shared_bytes"]) <= int(row["shared_limit"]), row
        assert int(row["blocks_per_multiprocessor"]) > 0, row


def test_attention_has_matrix_instructions_and_copies_that_do_not_wait(
    rows: list[dict[str, str]],
) -> None:
    cases = [row for row in rows if row["operator"] == "block_attention" and "D=" in row["case"]]
    # Three kernels, two head dimensions and two targets; of each the default row in bfloat16 and in
    # float32, and the target's own.
    assert len(cases) == 3 * 2 * 2 * 3
    for row in cases:
        assert matrix_instructions(row) > 0, row
        assert int(row["cp_async"]) > 0, row
        if "default" in row["case"]:
            assert int(row["shared_bytes"]) <= 99 << 10, row


def test_other_operators_have_them_in_bfloat16(rows: list[dict[str, str]]) -> None:
    cases = [
        row
        for row in rows
        if row["operator"] in ("masked_loss", "block_decode")
        and "bf16" in row["case"]
        and "merge" not in row["case"]
        and "default" not in row["case"]
    ]
    assert {(row["operator"], row["target"]) for row in cases} == {
        (operator, target)
        for operator in ("masked_loss", "block_decode")
        for target in ("sm_80", "sm_90")
    }
    for row in cases:
        assert matrix_instructions(row) > 0, row
        assert int(row["cp_async"]) > 0, row


def test_no_argument_that_varies_with_the_data_is_compiled_in(told: dict[str, Any]) -> None:
    """Lengths and counts are neither constants nor specialised on being 1 or a multiple of 16."""
    fixed = {"D", "ROWS", "KEYS", "KEEP", "PRECISION", "CHUNK", "H", "R", "scale", "grad_scale"}
    pointers = {
        *("q", "k", "v", "out", "rest", "lse", "ranges", "bounds", "grad_out", "delta"),
        *("dq", "dk", "dv", "entries", "counts"),
    }
    assert {name for name in told["fixed"] if not name.startswith("stride_")} == fixed | pointers


def test_tensors_on_a_cpu_are_refused_where_kernels_are_not_interpreted(
    told: dict[str, Any],
) -> None:
    assert told["on a cpu"].startswith("q must be on a CUDA device for backend triton")
    assert "got cpu" in told["on a cpu"]


def test_arguments_that_are_not_the_kernels_are_refused(told: dict[str, Any]) -> None:
    assert told["not its arguments"] == (
        "arguments must be those of forward_kernel; differing: ['Q']"
    )
