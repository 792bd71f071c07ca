"""Tuning takes the fastest tile that fits, agrees and does not spill, and writes it as data."""

from __future__ import annotations

import csv
import os
import shutil
import subprocess
import sys
from ast import literal_eval
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from abf_kernels import tuning
from abf_kernels.block_attention import triton as attention
from abf_kernels.block_decode import triton as decode
from abf_kernels.masked_loss import configs as loss_configs
from abf_kernels.masked_loss import triton as loss
from triton.runtime.errors import OutOfResources

from benchmarks.bench_attention import Shape
from benchmarks.gpu import serving, tune
from benchmarks.gpu.problem import Case

ROOT = Path(__file__).parents[2]
CPU, HOPPER = torch.device("cpu"), (9, 0)
KERNELS = {"block_attention": attention, "block_decode": decode, "masked_loss": loss}


def searches() -> list[tune.Search]:
    return list(
        tune.searches(
            CPU,
            dtype=torch.float32,
            cases=(Case(Shape(1, 1, 64, 64), 1, {}),),
            caches=(serving.Cache(1, 40, own=2, heads=2, groups=1, dim=64),),
            sizes=(9, 16, 50),
        )
    )


def sound(row: tuning.Row, operator: str) -> dict[str, int]:
    return dict.fromkeys(row.tiles, 0)


def fastest(search: tune.Search, clock: Any, **more: Any) -> tuning.Row:
    more = {"say": lambda _: None, "itemsize": 4, "rounds": 1, "spilled": sound} | more
    return tune.fastest(search, HOPPER, "measured on X", clock, **more)


@pytest.mark.parametrize("number", range(3), ids=KERNELS)
def test_each_kernel_of_each_operator_gets_its_fastest_tile(number: int) -> None:
    search = searches()[number]
    kernels: Any = KERNELS[search.operator]
    before, base = kernels.choose, search.configs().ROWS[tuning.DEFAULT, search.dim, 4]
    names = list(base.tiles)
    quick = {name: size * 2 if name in ("rows", "columns") else size
             for name, size in base.tiles[names[0]].items()}  # fmt: skip

    def clock(call: Callable[[], object]) -> float:
        """Slow for every kernel that does not have the quick tile."""
        chosen = kernels.choose(None, torch.float32, search.dim)
        wanted = search.configs().parse(
            tuning.Row("sm_90", search.dim, 4, dict.fromkeys(names, quick), {}, "")
        )
        # Attention has three tiles, the others one.
        pairs = zip(chosen, wanted, strict=True) if len(names) > 1 else [(chosen, wanted)]
        return 1.0 + sum(have != want for have, want in pairs)

    told: list[str] = []
    row = fastest(search._replace(tiles=(quick,)), clock, say=told.append)
    assert kernels.choose is before
    assert row == tuning.Row(
        "sm_90", search.dim, 4, dict.fromkeys(names, quick), {}, "measured on X"
    )
    assert len(told) == len(names)
    assert told[-1].endswith(f"{quick}, 2.000x the one in use; 2 tiles measured")


def stand_in(operator: str) -> tune.Search:
    """Its result is wrong with 17 rows, and does not fit with 33."""
    kernels: Any = KERNELS[operator]

    def call() -> tuple[torch.Tensor]:
        rows = kernels.choose(None, None, 0)
        rows = (rows.forward if operator == "block_attention" else rows).rows
        if rows == 33:
            raise OutOfResources(2, 1, "shared memory")
        return (torch.tensor([5.0 if rows == 17 else 1.0]),)

    base = searches()[list(KERNELS).index(operator)]
    first = next(iter(base.configs().ROWS[tuning.DEFAULT, base.dim, 4].tiles.values()))
    return base._replace(tiles=[first | {"rows": rows} for rows in (17, 33, 64, 128)], call=call)


def rows_decide(operator: str) -> Callable[[object], float]:
    """The more rows, the faster."""
    kernels: Any = KERNELS[operator]

    def clock(_: object) -> float:
        chosen = kernels.choose(None, None, 0)
        tiles = chosen if operator == "block_attention" else (chosen,)
        return 1 / sum(tile.rows for tile in tiles)

    return clock


def test_tiles_that_are_wrong_do_not_fit_or_spill_are_left_out() -> None:
    told: list[str] = []

    def spilled(row: tuning.Row, operator: str) -> dict[str, int]:
        return {name: 4 * (tile["rows"] == 128) for name, tile in row.tiles.items()}

    more = {"spilled": spilled, "say": told.append}
    row = fastest(stand_in("masked_loss"), rows_decide("masked_loss"), **more)
    assert row.tiles["logits"]["rows"] == 64
    assert not row.spills
    assert "wrong result, left out" in told[0]
    assert told[1].endswith("3 tiles measured")
    row = fastest(stand_in("block_attention"), rows_decide("block_attention"), **more)
    assert {tile["rows"] for tile in row.tiles.values()} == {128}
    assert set(row.spills) == {"forward", "dq", "dkv"}
    assert row.spills["dq"].startswith("4 bytes; the fastest of ")
    with pytest.raises(ValueError, match="every tile of masked_loss logits spills too much"):
        fastest(
            stand_in("masked_loss"), rows_decide("masked_loss"),
            spilled=lambda row, operator: dict.fromkeys(row.tiles, 1),
        )  # fmt: skip


def test_what_a_row_spills_is_what_the_compiler_says() -> None:
    """In a process whose kernels are not interpreted."""
    told = subprocess.run(
        [sys.executable, "-c",
         "from abf_kernels.block_attention.configs import ROWS\n"
         "from benchmarks.gpu.tune import stacks\n"
         "print(stacks(ROWS['sm_90', 128, 2], 'block_attention'))"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    with open(ROOT / "benchmarks" / "results" / "kernels_ahead.csv", newline="") as handle:
        rows = {row["case"]: row for row in csv.DictReader(handle)}
    assert literal_eval(told) == {
        kernel: int(rows[f"{kernel} bf16 D=128 (sm_90)"]["stack_bytes"])
        for kernel in ("forward", "dq", "dkv")
    }


def test_other_architectures_are_refused() -> None:
    with pytest.raises(ValueError, match=r"measured for sm_80, sm_90; this is sm_89"):
        tune.fastest(stand_in("masked_loss"), (8, 9), "x", lambda _: 1.0, lambda _: None)


def test_what_was_measured_is_read_in_place_of_what_was_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "configs.json"
    shutil.copy(loss_configs.FILE, path)
    monkeypatch.setattr(loss_configs, "FILE", path)
    before = tuning.read(path)
    old = before["sm_90", 0, 2]
    new = tuning.Row("sm_90", 0, 2, {"logits": old.tiles["logits"] | {"rows": 128}}, {}, "measured")
    tune.write("masked_loss", new)
    assert tuning.read(path) == before | {new.key: new}
