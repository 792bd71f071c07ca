"""Samples of the machine while a training runs, in a file beside its journal: `system.jsonl`.

Names and units are MLflow's (percentages of the whole node, megabytes of 1e6 bytes, watts), so that
its page "System metrics" shows them; `process_*` is the training's own share. A record is the mean
of the samples since the last one. The journal and the training know nothing of it: a sample that
fails is reported once and ends no training.
"""

from __future__ import annotations

import contextlib
import functools
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil

from abf.track.journal import Journal
from abf.track.meter import nvml_devices

SYSTEM = "system"
"""Name of the events, stem of the file, and MLflow's prefix of such metrics."""
SAMPLE_SECONDS = 10.0
"""A sample and its record cost 0.4 ms of one core."""
RECORDS = 360
"""A record covers at least this share of the attempt so far: it is a sample for the first hour,
four minutes after a day, and a day of training leaves 1,500 records (0.4 MB)."""
JOIN_SECONDS = 5.0
"""A driver that does not answer must not keep a finished training from ending."""
DRIVER = Path("/proc/driver/nvidia")
"""Exists where there are GPUs, whether or not we have the means to ask them."""

Probes = dict[str, Callable[[], float]]
"""Metric name -> its value now."""


@contextlib.contextmanager
def system_samples(directory: Path, *, interval: float = SAMPLE_SECONDS) -> Iterator[None]:
    """Sample this node while the body runs; of a node's processes only the first does it.

    Args:
        directory: stage directory; the first node writes `system.jsonl`, others `system-{n}.jsonl`.
        interval: seconds between samples.
    """
    if int(os.environ.get("LOCAL_RANK", "0")):
        yield
        return
    node = int(os.environ.get("GROUP_RANK") or os.environ.get("SLURM_NODEID") or "0")
    sampler = _Sampler(directory, node, interval)
    thread = threading.Thread(target=sampler.run, name="system samples", daemon=True)
    thread.start()
    try:
        yield
    finally:
        sampler.stop.set()
        thread.join(JOIN_SECONDS)


class _Sampler:
    def __init__(self, directory: Path, node: int, interval: float) -> None:
        self.path = directory / f"{SYSTEM}{f'-{node}' if node else ''}.jsonl"
        self.prefix = f"node_{node}/" if node else ""
        self.interval = interval
        self.stop = threading.Event()

    def run(self) -> None:
        """Sample until told to stop, and once more then."""
        try:
            probes = {**_processor(), **self._gpus()}
            with Journal(self.path) as journal:
                # Goes on over attempts: no step of the metrics appears twice.
                self._run(journal, probes, number=self.path.read_bytes().count(b"\n"))
        except Exception as error:  # whatever it is, the training is worth more
            self._say(f"no samples of the system from here on: {type(error).__name__}: {error}")

    def _run(self, journal: Journal, probes: Probes, *, number: int) -> None:
        began = recorded = time.monotonic()
        samples: list[dict[str, float]] = []
        stopped = False
        while not stopped:
            stopped = self.stop.wait(self.interval)
            samples.append(self._sample(probes))
            now = time.monotonic()
            # Half an interval of slack: a wait is never exact.
            due = recorded + max(self.interval, (now - began) / RECORDS) - self.interval / 2
            if stopped or now >= due:
                journal.event(SYSTEM, step=number, values=self._means(samples))
                number, recorded, samples = number + 1, now, []

    def _sample(self, probes: Probes) -> dict[str, float]:
        values: dict[str, float] = {}
        for name, probe in list(probes.items()):
            try:
                values[name] = probe()
            except Exception as error:  # psutil's, NVML's or the kernel's: one figure less
                del probes[name]
                self._say(f"{name} cannot be sampled: {type(error).__name__}: {error}")
        return values

    def _means(self, samples: list[dict[str, float]]) -> dict[str, float]:
        names = samples[-1]
        return {
            f"{self.prefix}{name}": round(sum(s[name] for s in samples) / len(samples), 1)
            for name in names
        }

    def _gpus(self) -> Probes:
        found = nvml_devices()
        if not isinstance(found, str):
            return _gpu_probes(*found)
        if DRIVER.exists():
            self._say(f"GPUs are not sampled: {found}")
        return {}

    def _say(self, text: str) -> None:
        print(f"{self.path}: {text}", file=sys.stderr, flush=True)


def _processor() -> Probes:
    process = psutil.Process()
    # Both mean "since the last call": the first one only begins.
    psutil.cpu_percent()
    process.cpu_percent()
    return {
        "cpu_utilization_percentage": psutil.cpu_percent,
        "system_memory_usage_megabytes": lambda: psutil.virtual_memory().used / 1e6,
        "system_memory_usage_percentage": lambda: psutil.virtual_memory().percent,
        "process_cpu_utilization_percentage": process.cpu_percent,
        "process_memory_usage_megabytes": lambda: process.memory_info().rss / 1e6,
    }


def _gpu_probes(nvml: Any, handles: Sequence[Any]) -> Probes:
    def memory(handle: Any) -> float:
        return nvml.nvmlDeviceGetMemoryInfo(handle).used / 1e6

    def utilization(handle: Any) -> float:
        return nvml.nvmlDeviceGetUtilizationRates(handle).gpu

    def power(handle: Any) -> float:
        return nvml.nvmlDeviceGetPowerUsage(handle) / 1e3  # milliwatts

    reads = {
        "utilization_percentage": utilization,
        "memory_usage_megabytes": memory,
        "power_usage_watts": power,
    }
    return {
        f"gpu_{index}_{name}": functools.partial(read, handle)
        for index, handle in enumerate(handles)
        for name, read in reads.items()
    }
