"""RAPL counters that count, wrap, and are missing."""

from __future__ import annotations

from pathlib import Path

import pytest

from abf.track.meter import EnergyMeter


def zone(root: Path, name: str, label: str, energy: int, span: int = 1_000_000_000) -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "name").write_text(f"{label}\n")
    (folder / "energy_uj").write_text(f"{energy}\n")
    (folder / "max_energy_range_uj").write_text(f"{span}\n")
    return folder / "energy_uj"


def test_packages_are_added_and_a_wrap_is_undone(tmp_path: Path) -> None:
    one = zone(tmp_path, "intel-rapl:0", "package-0", 5_000_000)
    two = zone(tmp_path, "intel-rapl:1", "package-1", 999_000_000)
    zone(tmp_path, "intel-rapl:0:0", "core", 0)
    zone(tmp_path, "intel-rapl:2", "psys", 0)
    with EnergyMeter(powercap=tmp_path) as meter:
        one.write_text("7500000\n")
        two.write_text("1000000\n")
    assert meter.source == "rapl:package"
    assert meter.joules == pytest.approx(2.5 + 2.000001)


def test_no_counter_is_said_and_never_estimated(tmp_path: Path) -> None:
    with EnergyMeter(powercap=tmp_path) as meter:
        pass
    assert meter.joules is None
    assert meter.source == f"not measured: no RAPL package counter below {tmp_path}"


def test_a_counter_that_cannot_be_read(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5).unlink()
    with EnergyMeter(powercap=tmp_path) as meter:
        pass
    assert meter.joules is None
    assert "energy_uj: No such file" in meter.source


def test_a_cuda_run_is_not_measured_by_the_processors_counter(tmp_path: Path) -> None:
    zone(tmp_path, "intel-rapl:0", "package-0", 5)
    with EnergyMeter("cuda", powercap=tmp_path) as meter:
        pass
    assert meter.source == "nvml" or meter.source.startswith("not measured: ")
    assert meter.source != "rapl:package"
