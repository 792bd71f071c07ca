"""The facts behind a bit-exact resume: recorded, compared by name, and the settings put back."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from abf.model.device import CPU
from abf.train.runtime import differences, environment, settings


def test_the_same_process_has_the_same_environment() -> None:
    first = environment(device=CPU, precision="fp32", world_size=1, sharding="none")
    assert first == environment(device=CPU, precision="fp32", world_size=1, sharding="none")
    assert set(first) == {
        "cpu",
        "device",
        "instructions",
        "numpy",
        "precision",
        "sharding",
        "threads",
        "torch",
        "world_size",
    }
    assert first["torch"] == torch.__version__.split("+")[0] or first["torch"] == torch.__version__
    assert all(first.values())


def test_every_difference_is_named() -> None:
    before = {"cpu": "EPYC", "threads": "1", "torch": "2.13.0"}
    now = {"cpu": "EPYC", "threads": "2", "numpy": "2.4"}
    assert differences(before, now) == [
        "numpy: not recorded -> 2.4",
        "threads: 1 -> 2",
        "torch: 2.13.0 -> not recorded",
    ]
    assert differences(now, now) == []


def test_limits_on_instructions_are_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    here: Any = {"device": CPU, "precision": "bf16", "world_size": 1, "sharding": "none"}
    before = environment(**here)
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    (difference,) = differences(before, environment(**here))
    assert "ONEDNN_MAX_CPU_ISA=AVX2" in difference


def test_settings_hold_inside_and_are_put_back() -> None:
    before = torch.get_num_threads()
    with settings(threads=3):
        assert torch.get_num_threads() == 3
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.get_num_threads() == before
    assert not torch.are_deterministic_algorithms_enabled()
