"""Samples of the system: named for MLflow, goes on over attempts, never ends a training."""

from __future__ import annotations

import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest

from abf.track import system
from abf.track.journal import Journal, read_journal
from abf.track.mlflow_points import journal_name, read_new_points
from abf.track.system import system_samples
from tests.track.cells import Store, make_cell, make_plan

NAMES = {
    "cpu_utilization_percentage",
    "system_memory_usage_megabytes",
    "system_memory_usage_percentage",
    "process_cpu_utilization_percentage",
    "process_memory_usage_megabytes",
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "GROUP_RANK", "SLURM_NODEID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", None)  # as where it is not installed


def sample(directory: Path, samples: int = 3) -> list[dict[str, Any]]:
    """Records of a body that ends after some samples."""
    path = directory / "system.jsonl"
    before = len(read_journal(path)) if path.exists() else 0
    with system_samples(directory, interval=0.001):
        while not path.exists() or len(path.read_bytes().splitlines()) < before + samples:
            time.sleep(0.001)
    return read_journal(path)


def test_names_numbers_and_the_end_of_the_thread(tmp_path: Path) -> None:
    records = sample(tmp_path)
    assert not [t for t in threading.enumerate() if t.name == "system samples"]
    assert [record["step"] for record in records] == list(range(len(records)))
    assert all(record["name"] == "system" for record in records)
    values = records[-1]["values"]
    assert values.keys() == NAMES
    assert 0 <= values["system_memory_usage_percentage"] <= 100
    resident = psutil.Process().memory_info().rss / 1e6
    assert values["process_memory_usage_megabytes"] == pytest.approx(resident, rel=0.5)


def test_an_attempt_shorter_than_the_interval_leaves_one_record(tmp_path: Path) -> None:
    with system_samples(tmp_path):
        pass
    (record,) = read_journal(tmp_path / "system.jsonl")
    assert record["values"].keys() == NAMES


def test_the_next_attempt_counts_on_after_a_torn_line(tmp_path: Path) -> None:
    count = len(sample(tmp_path))
    with open(tmp_path / "system.jsonl", "a") as handle:
        handle.write('{"kind":"event","time":1,"na')
    records = sample(tmp_path)
    assert len(records) > count
    assert [record["step"] for record in records] == list(range(len(records)))


def test_one_process_a_node_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    with system_samples(tmp_path):
        pass
    assert not list(tmp_path.iterdir())
    monkeypatch.setenv("LOCAL_RANK", "0")
    monkeypatch.setenv("SLURM_NODEID", "1")
    with system_samples(tmp_path):
        pass
    (record,) = read_journal(tmp_path / "system-1.jsonl")
    assert record["values"].keys() == {f"node_1/{name}" for name in NAMES}


def test_a_probe_that_fails_is_said_once_and_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def broken() -> None:
        raise OSError("no /proc/meminfo here")

    monkeypatch.setattr(psutil, "virtual_memory", broken)
    records = sample(tmp_path)
    assert records[-1]["values"].keys() == {name for name in NAMES if "system_mem" not in name}
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 2
    assert "system_memory_usage_megabytes cannot be sampled: OSError: no /proc/meminfo" in said[0]


def test_what_cannot_be_written_ends_no_training(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "system.jsonl").mkdir()
    with system_samples(tmp_path):
        done = True
    assert done
    (said,) = capfd.readouterr().err.splitlines()
    assert "system.jsonl: no samples of the system from here on: IsADirectoryError" in said


def test_the_bodys_own_error_passes_through(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), system_samples(tmp_path):
        _ = 1 / 0
    assert len(read_journal(tmp_path / "system.jsonl")) == 1


def test_records_grow_rarer_and_are_means(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A day on a clock of our own: every sample is in exactly one record."""
    clock = [0.0]
    sampler = system._Sampler(tmp_path, 0, 10.0)

    def wait(seconds: float) -> bool:
        clock[0] += seconds
        return clock[0] >= 86_400

    monkeypatch.setattr(sampler, "stop", SimpleNamespace(wait=wait))
    monkeypatch.setattr(system.time, "monotonic", lambda: clock[0])
    with Journal(tmp_path / "system.jsonl") as journal:
        sampler._run(journal, {"clock": lambda: clock[0]}, number=0)
    records = read_journal(tmp_path / "system.jsonl")
    values = [record["values"]["clock"] for record in records]
    assert values[:3] == [10, 20, 30]
    assert 1200 < len(records) < 1800
    # Means of 10 s steps: the samples up to a record's end are all in it or before it.
    end = 0.0
    for value in values:
        count = round((value - end) / 5 - 1)  # samples end + 10 .. end + 10 count have this mean
        assert value == pytest.approx(end + 5 * (count + 1))
        end += 10 * count
    assert end == 86_400


def power(handle: int) -> int:
    if handle:
        raise RuntimeError("Not Supported")
    return 61_500


NVML = SimpleNamespace(
    NVMLError=RuntimeError,
    nvmlInit=lambda: None,
    nvmlDeviceGetCount=lambda: 2,
    nvmlDeviceGetHandleByIndex=lambda index: index,
    nvmlDeviceGetMemoryInfo=lambda handle: SimpleNamespace(used=(handle + 1) * 2e9, total=64e9),
    nvmlDeviceGetUtilizationRates=lambda handle: SimpleNamespace(gpu=97 * handle, memory=1),
    nvmlDeviceGetPowerUsage=power,
)
"""Two GPUs: one of them busy, one that does not tell its power."""


def test_gpus_through_nvml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", NVML)
    values = sample(tmp_path)[-1]["values"]
    assert {name: value for name, value in values.items() if name.startswith("gpu_")} == {
        "gpu_0_utilization_percentage": 0,
        "gpu_0_memory_usage_megabytes": 2000,
        "gpu_0_power_usage_watts": 61.5,
        "gpu_1_utilization_percentage": 97,
        "gpu_1_memory_usage_megabytes": 4000,
    }
    assert "gpu_1_power_usage_watts cannot be sampled: RuntimeError: Not Supp" in (
        capfd.readouterr().err
    )


def test_gpus_without_nvml_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(system, "DRIVER", tmp_path)
    assert sample(tmp_path)[-1]["values"].keys() == NAMES
    assert "GPUs are not sampled: pynvml is not installed" in capfd.readouterr().err


def test_mlflow_shows_them_below_system(tmp_path: Path, template: Path) -> None:
    results = tmp_path / "results"
    cell = make_cell(results, "a")
    directory = cell.stage_dirs["train"]
    count = len(sample(directory))
    path = directory / "system.jsonl"
    assert journal_name(path) == "train.system"
    points = read_new_points(path, offset=0, tail="").points
    assert {point.key for point in points} == {f"system/{name}" for name in NAMES}
    cell = replace(cell, journals=[*cell.journals, path])
    store = Store(tmp_path / "store", template)
    store.ingest(make_plan(results, cell))
    before = store.tables()
    assert store.ingest(make_plan(results, cell))["points"] == 0
    assert store.tables() == before
    more = len(sample(directory)) - count
    assert store.ingest(make_plan(results, cell))["points"] == more * len(NAMES)
    found = store.content()["a"]["metrics"]
    assert [step for step, _, _ in found["system/cpu_utilization_percentage"]] == list(
        range(count + more)
    )
    assert len(found["train/loss"]) == 40
