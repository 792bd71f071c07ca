"""Joules between two moments, from a hardware counter, or the reason why there is none.

A processor run reads RAPL package counters (the whole package, whoever else runs on it), a CUDA run
reads NVML's energy counters of the visible devices. Nothing is ever estimated from power ratings.
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

POWERCAP = Path("/sys/class/powercap")
POLL_SECONDS = 30.0
"""RAPL counters wrap (minutes to hours at full power): they are read at least this often."""


class _Counter(Protocol):
    source: str

    def read(self) -> float:
        """Joules since the counter was opened."""
        ...


class _Rapl:
    """Sum over processor packages, wrap-around undone."""

    source = "rapl:package"

    def __init__(self, zones: list[Path]) -> None:
        self._zones = [
            (zone / "energy_uj", int((zone / "max_energy_range_uj").read_text())) for zone in zones
        ]
        self._last = [int(path.read_text()) for path, _ in self._zones]
        self._joules = 0.0
        self._lock = threading.Lock()

    def read(self) -> float:
        with self._lock:
            for index, (path, span) in enumerate(self._zones):
                now = int(path.read_text())
                # The counter starts over at its range; it cannot have done so twice.
                self._joules += (now - self._last[index]) % (span + 1) / 1e6
                self._last[index] = now
            return self._joules


class _Nvml:
    """Sum over the devices this process may use."""

    source = "nvml"

    def __init__(self, nvml: Any, handles: list[Any]) -> None:
        self._nvml, self._handles = nvml, handles
        self._start = self._total()

    def _total(self) -> float:
        millijoules = map(self._nvml.nvmlDeviceGetTotalEnergyConsumption, self._handles)
        return sum(millijoules) / 1e3

    def read(self) -> float:
        return self._total() - self._start


def _open_rapl(root: Path) -> _Rapl | str:
    zones = [
        zone
        for zone in sorted(root.glob("intel-rapl:*"))
        if zone.name.count(":") == 1 and (zone / "name").read_text().startswith("package")
    ]
    if not zones:
        return f"no RAPL package counter below {root}"
    try:
        return _Rapl(zones)
    except OSError as error:  # readable by root only, on most kernels
        return f"{error.filename}: {error.strerror}"


def nvml_devices() -> tuple[Any, list[Any]] | str:
    """NVML's module (pynvml, from nvidia-ml-py) and the devices this process may use, or why not.

    It is optional: a machine without GPUs needs no NVML, and envs/ pin none for processors.
    """
    try:
        import pynvml  # pyright: ignore[reportMissingImports]
    except ImportError:
        return "pynvml is not installed"
    try:
        pynvml.nvmlInit()
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        if visible is None:
            names = [str(index) for index in range(pynvml.nvmlDeviceGetCount())]
        else:
            names = [name.strip() for name in visible.split(",") if name.strip()]
        handles = [
            pynvml.nvmlDeviceGetHandleByIndex(int(name))
            if name.isdigit()
            else pynvml.nvmlDeviceGetHandleByUUID(name)
            for name in names
        ]
        return (pynvml, handles) if handles else "no CUDA device is visible"
    except pynvml.NVMLError as error:
        return f"NVML: {error}"


def _open_nvml() -> _Nvml | str:
    found = nvml_devices()
    return found if isinstance(found, str) else _Nvml(*found)


class EnergyMeter:
    """Energy used inside a `with` block.

    Args:
        device: torch device type the work runs on; it decides which counter is read.
        powercap: root of the RAPL files.
    """

    def __init__(self, device: str = "cpu", *, powercap: Path = POWERCAP) -> None:
        self.joules: float | None = None
        """Energy of the block, once it was left; None if there is no meter."""
        self.source = ""
        """`rapl:package`, `nvml`, or `not measured: ...` with the reason."""
        self._device, self._powercap = device, powercap
        self._counter: _Counter | None = None
        self._left = threading.Event()
        self._poller: threading.Thread | None = None

    def __enter__(self) -> EnergyMeter:
        found = _open_nvml() if self._device == "cuda" else _open_rapl(self._powercap)
        if isinstance(found, str):
            self.source = f"not measured: {found}"
            return self
        self._counter, self.source = found, found.source
        self._poller = threading.Thread(target=self._poll, args=(found,), daemon=True)
        self._poller.start()
        return self

    def _poll(self, counter: _Counter) -> None:
        while not self._left.wait(POLL_SECONDS):
            counter.read()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._counter is None or self._poller is None:
            return
        self._left.set()
        self._poller.join()
        self.joules = self._counter.read()
