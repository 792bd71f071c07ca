"""A checkpoint is whole or it is not used; the one before it then is, and the reader is told."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from abf.train import checkpoint
from abf.train import saver as saver_module
from abf.train.parallel import World
from abf.train.saver import Saver
from tests.train.equality import read

PART = "rank-00000.safetensors"


def tensors(step: int) -> dict[str, Tensor]:
    weight = torch.full((64, 64), float(step))
    moments = {"optimizer.layer.weight.exp_avg": -weight, "optimizer.norm.step": weight[0, 0]}
    return {"model.layer.weight": weight, "model.norm": torch.arange(3.0), **moments}


def save(run_dir: Path, step: int, *, keep: int = 2, **state: Any) -> Path:
    saver = Saver(run_dir, World(), keep=keep)
    saver.save(tensors(step), state, step=step)
    saver.wait()
    done = saver.poll()
    assert done is not None
    assert done[0] == step
    return done[1]


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "ckpt").iterdir())


def test_comes_back_as_written(tmp_path: Path) -> None:
    path = save(tmp_path, 7, wall_s=0.1 + 0.2, environment={"cpu": "x"})
    found, damaged = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.path, found.step, damaged) == (path, 7, [])
    assert found.state["wall_s"] == 0.1 + 0.2
    loaded = {name: torch.full_like(value, 99) for name, value in tensors(7).items()}
    found.load(loaded)
    assert all(torch.equal(loaded[name], value) for name, value in tensors(7).items())
    state = json.loads((path / "state.json").read_text())
    assert set(state["files"]) == {PART}


def test_what_is_saved_is_what_was_there_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The training writes on into its tensors while they go to the disk."""
    go_on, real = threading.Event(), saver_module.save

    def slow(*args: Any, **kwargs: Any) -> Any:
        assert go_on.wait(60)
        return real(*args, **kwargs)

    monkeypatch.setattr(saver_module, "save", slow)
    saver, values = Saver(tmp_path, World(), keep=2), tensors(3)
    saver.save(values, {}, step=3)
    for value in values.values():
        value.fill_(-1)
    assert checkpoint.latest(tmp_path)[0] is None
    assert saver.poll() is None
    go_on.set()
    saver.wait()
    found, _ = checkpoint.latest(tmp_path)
    assert found is not None
    assert all(torch.equal(value, tensors(3)[name]) for name, value in read(found).items())


def test_nothing_there(tmp_path: Path) -> None:
    assert checkpoint.latest(tmp_path) == (None, [])


def test_keeps_the_newest(tmp_path: Path) -> None:
    for step in (1, 2, 10, 9_999_999):
        save(tmp_path, step, keep=2)
    assert names(tmp_path) == ["step-00000010", "step-09999999"]


def cut_in_half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-100] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", [PART, "state.json"])
@pytest.mark.parametrize("damage", [cut_in_half, flip_a_bit, Path.unlink])
def test_a_damaged_one_is_named_and_the_one_before_is_used(
    tmp_path: Path, name: str, damage: Any
) -> None:
    save(tmp_path, 1)
    newest = save(tmp_path, 2)
    damage(newest / name)
    found, damaged = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 1
    assert len(damaged) == 1
    assert str(newest / name) in damaged[0]


def test_all_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        cut_in_half(save(tmp_path, step) / PART)
    found, damaged = checkpoint.latest(tmp_path)
    assert found is None
    assert ["step-00000002" in damaged[0], "step-00000001" in damaged[1]] == [True, True]


def test_another_format_is_not_guessed_at(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "FORMAT", 3)
    found, damaged = checkpoint.latest(tmp_path)
    assert found is None
    assert "has format 2; this version reads 3" in damaged[0]


def test_saving_again_replaces_damaged_ones_and_what_a_killed_writer_left(tmp_path: Path) -> None:
    save(tmp_path, 1)
    cut_in_half(save(tmp_path, 4) / "state.json")
    (tmp_path / "ckpt" / ".step-00000004.tmp").mkdir()
    save(tmp_path, 2)  # the run went back to 1: what lies beyond is gone, 1 and 2 are kept
    assert names(tmp_path) == ["step-00000001", "step-00000002"]
    cut_in_half(tmp_path / "ckpt" / "step-00000002" / PART)
    save(tmp_path, 2)
    found, damaged = checkpoint.latest(tmp_path)
    assert found is not None
    assert (found.step, damaged) == (2, [])


def test_a_full_disk_leaves_the_checkpoints_before(tmp_path: Path) -> None:
    """A real refusal by the kernel: files of this process may not grow beyond 64 kB."""
    save(tmp_path, 1)
    script = (
        "import resource, sys, torch\n"
        "from pathlib import Path\n"
        "from abf.errors import ArtifactError\n"
        "from abf.train.parallel import World\n"
        "from abf.train.saver import Saver\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (65536, 65536))\n"
        "try:\n"
        "    saver = Saver(Path(sys.argv[1]), World(), keep=2)\n"
        "    saver.save({'w': torch.zeros(100_000)}, {}, step=2)\n"
        "    saver.wait()\n"
        "except ArtifactError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True
    )
    assert "checkpoint of step 2 could not be written" in done.stdout
    assert "File too large" in done.stdout
    assert "the checkpoints before it stand" in done.stdout
    assert names(tmp_path) == ["step-00000001"]
    assert checkpoint.latest(tmp_path)[1] == []


def test_interrupted_while_writing_leaves_nothing_half(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 1)

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(saver_module, "_write_safetensors", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save(tmp_path, 2)
    assert names(tmp_path) == ["step-00000001"]


def test_a_published_run_needs_none(tmp_path: Path) -> None:
    save(tmp_path, 1)
    checkpoint.clear(tmp_path)
    checkpoint.clear(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_no_pickle_is_written(tmp_path: Path) -> None:
    path = save(tmp_path, 1)
    assert sorted(file.suffix for file in path.iterdir()) == [".json", ".safetensors"]
