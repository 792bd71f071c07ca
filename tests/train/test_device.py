"""Training on a device that is not the processor: nothing is left behind, and all values are equal.

No GPU is needed: the device is a pretended one (`tests.train.pretend`).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from abf.errors import ConfigError
from abf.model.device import CPU, own_device
from tests.train.equality import assert_same_run, curve
from tests.train.on_device import RUNS, STEPS, charged, decoded, stepped
from tests.train.test_parallel import trainer_of
from tests.train.tiny_run import tiny_train


@pytest.fixture(scope="module")
def there(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What was done on the device."""
    root = tmp_path_factory.mktemp("device")
    command = [sys.executable, "-m", "tests.train.on_device", str(root)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return root


@pytest.mark.parametrize("name", STEPS)
def test_steps_on_a_device_are_those_on_the_processor(there: Path, name: str) -> None:
    wanted, weights = stepped(trainer_of(there / "steps" / "train.arrow", STEPS[name]))
    found, after = torch.load(there / "steps" / f"{name}.pt", weights_only=False)
    for one, other in zip(found, wanted, strict=True):
        assert (one.counts, one.masked, one.watch) == (other.counts, other.masked, other.watch)
        assert one.sums == pytest.approx(other.sums, rel=1e-5)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-5)
    for parameter, weight in weights.items():
        # AdamW divides small gradients by themselves: rounding shows at the size of an update.
        assert torch.allclose(after[parameter], weight, atol=1e-5), parameter


@pytest.mark.parametrize("name", RUNS)
def test_a_run_on_a_device_stops_resumes_and_ends_as_ever(
    there: Path, tmp_path: Path, name: str
) -> None:
    """Checkpoints and the finished model are the processor's, whatever wrote them."""
    tiny_train(tmp_path, RUNS[name])
    assert_same_run(there / "whole" / name, there / "parts" / name)
    for (*_, found), (*_, wanted) in zip(
        curve(there / "whole" / name), curve(tmp_path), strict=True
    ):
        assert found == pytest.approx(wanted, rel=1e-4, abs=1e-6)


def test_texts_decoded_on_a_device_are_those_of_the_processor(there: Path, tmp_path: Path) -> None:
    found = json.loads((there / "decoded.json").read_text())
    assert found == decoded(tmp_path / "decode", CPU)
    assert len({str(texts) for texts in found.values()}) == len(found), "strategies must differ"


def test_nats_scored_on_a_device_are_those_of_the_processor(there: Path) -> None:
    wanted = charged(there / "steps" / "train.arrow", CPU)
    with np.load(there / "charged.npz") as found:
        assert set(found) == set(wanted)
        for name, nats in wanted.items():
            assert np.any(nats > 0), name
            np.testing.assert_allclose(found[name], nats, rtol=1e-5, err_msg=name)


def test_ranks_of_a_node_take_its_gpus_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOCAL_RANK", "SLURM_LOCALID"):
        monkeypatch.delenv(name, raising=False)
    assert own_device("auto") == CPU
    with pytest.raises(ConfigError, match="sees no GPU"):
        own_device("cuda")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert own_device("cpu") == CPU
    assert own_device() == torch.device("cuda", 0)
    monkeypatch.setenv("SLURM_LOCALID", "6")
    assert own_device() == torch.device("cuda", 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert own_device("cuda") == torch.device("cuda", 3)
    # Slurm shows each task its own GPU alone, whatever the task's number.
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert own_device() == torch.device("cuda", 0)
