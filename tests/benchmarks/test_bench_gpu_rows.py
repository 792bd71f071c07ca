"""Rows of the GPU benchmark are on disk as they come, and an interrupted run goes on."""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks.gpu.__main__ import Job, measure
from benchmarks.gpu.table import FIELDS, Table, file_of, machine, read
from benchmarks.gpu.timing import Figure, figure

CPU = torch.device("cpu")


def test_a_run_that_is_cut_short_leaves_its_rows(tmp_path: Path) -> None:
    path = file_of(tmp_path, "NVIDIA A100-SXM-64GB")
    assert path.name == "gpu_nvidia_a100_sxm_64gb.csv"
    table = Table(path, {"device": "NVIDIA A100-SXM-64GB"})
    table.add(figure("one", [1.0], "us", detail="a, b"))
    assert not path.exists()
    with open(table.partial, newline="") as handle:
        (row,) = csv.DictReader(handle)
    assert set(row) == {*FIELDS, "job", "device"}
    assert (row["figure"], row["detail"]) == ("one", "a, b")
    assert table.done() == path
    assert path.is_file()
    assert {"device", "torch", "triton", "git_sha"} <= set(machine(CPU))


def job(name: str, *values: float) -> Job:
    def run() -> Iterator[Figure]:
        for number, value in enumerate(values):
            if math.isnan(value):
                raise RuntimeError(f"{name} broke")
            yield figure(f"{name} {number}", [value], "us")

    return Job("part", name, run)


def test_a_run_goes_on_where_it_was_cut(tmp_path: Path) -> None:
    path, common = tmp_path / "gpu_x.csv", {"device": "X", "git_sha": "abc"}
    told: list[str] = []
    todo = [job("a", 1.0, 2.0), job("b", 3.0, math.nan), job("c", 5.0)]
    assert not measure(todo, Table(path, common), told.append, minutes=1)
    assert "RuntimeError: b broke" in "".join(told)
    assert told[-1] == "not measured: part b: failed, see above"
    assert not path.exists()
    # A row of what was not finished goes; what was finished is not measured again.
    told.clear()
    table = Table(path, common)
    assert [row["figure"] for row in table.rows] == [
        "a 0", "a 1", "seconds of part a", "c 0", "seconds of part c",
    ]  # fmt: skip
    todo = [job("a", math.nan), job("b", 6.0), job("c", math.nan)]
    assert measure(todo, table, told.append, minutes=1)
    assert "[1/3] part a: kept from the run before" in told
    rows = read(table.done())
    assert [row["value"] for row in rows if not row["figure"].startswith("seconds")] == [
        "1.0", "2.0", "5.0", "6.0",
    ]  # fmt: skip
    assert {row["git_sha"] for row in rows} == {"abc"}
    assert [p.name for p in tmp_path.iterdir()] == ["gpu_x.csv"]


def test_other_code_begins_anew_and_a_part_replaces_its_own_rows(tmp_path: Path) -> None:
    path = tmp_path / "gpu_x.csv"
    measure([job("a", 1.0), job("b", 2.0)], Table(path, {"git_sha": "old"}), str, minutes=1)
    Table(path, {"git_sha": "old"}).done()
    table = Table(path, {"git_sha": "new"})
    assert not table.rows
    measure([job("a", 7.0)], table, str, minutes=1)
    assert not Table(path, {"git_sha": "newer"}).rows
    measure([job("a", 8.0)], table := Table(path, {"git_sha": "newest"}), str, minutes=1)
    table.done(whole=False)
    found = {row["figure"]: (row["value"], row["git_sha"]) for row in read(path)}
    assert found["a 0"] == ("8.0", "newest")
    assert found["b 0"] == ("2.0", "old")


def test_no_job_begins_when_the_time_is_over(tmp_path: Path) -> None:
    told: list[str] = []
    table = Table(tmp_path / "gpu_x.csv", {})
    assert not measure([job("a", 1.0)], table, told.append, minutes=-1)
    assert told == ["not measured: part a: the -1 minutes are over"]
    assert not table.rows
