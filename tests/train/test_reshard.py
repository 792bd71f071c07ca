"""Shards on disk go into any number of ranks: the same curve, on as many ranks the same bits."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.multiprocessing.spawn import start_processes

from abf.errors import ArtifactError, Interrupted
from abf.train import checkpoint
from abf.train.loop import TrainResult
from abf.train.parallel import world
from abf.train.saver import Saver
from abf.train.shard import RANKS_PER_NODE, whole
from abf.train.step import StepResult, Trainer
from tests.train.equality import assert_same_run, curve, events, read
from tests.train.ranks import join
from tests.train.tiny_run import tiny_train, write_rows

FULL: dict[str, Any] = {"parallel": {"sharding": "full"}}
HYBRID: dict[str, Any] = {"parallel": {"sharding": "hybrid"}}


def stopped(directory: Path, changes: dict[str, Any]) -> None:
    """Both ranks of a run, stopped during its fifth step by a signal to the second."""
    real = Trainer.step

    def with_signal(self: Trainer, number: int) -> StepResult:
        if dist.get_rank() == 1 and number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, number)

    Trainer.step = with_signal
    try:
        with pytest.raises(Interrupted, match="after step 5"):
            tiny_train(directory, changes)
    finally:
        Trainer.step = real


def two_ranks(rank: int, root: Path) -> None:
    join(rank, root)
    os.environ[RANKS_PER_NODE] = "1"
    result = tiny_train(root / "whole", FULL)
    torch.save(result.model.state_dict(), root / f"model.{rank}.pt")
    stopped(root / "again", FULL)
    tiny_train(root / "again", FULL)
    stopped(root / "to_one", FULL)
    tiny_train(root / "from_one", FULL)
    stopped(root / "to_hybrid", FULL)
    tiny_train(root / "to_hybrid", HYBRID)
    stopped(root / "to_none", HYBRID)
    tiny_train(root / "to_none")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks; `from_one` begins with the checkpoint of a run of one."""
    root = tmp_path_factory.mktemp("reshard")
    names = ("whole", "again", "to_one", "from_one", "to_hybrid", "to_none")
    for name in names:
        write_rows(root / name)
    real = Trainer.step

    def with_signal(self: Trainer, number: int) -> StepResult:
        if number == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, number)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(Trainer, "step", with_signal)
        tiny_train(root / "from_one", FULL)
    start_processes(two_ranks, (root,), nprocs=2, start_method="spawn")
    return root


def test_as_many_ranks_go_on_bit_for_bit(runs: Path) -> None:
    assert_same_run(runs / "whole", runs / "again")
    assert "resume" in events(runs / "again")
    files = sorted(path.name for path in (runs / "whole/ckpt/step-00000010").iterdir())
    assert files == ["rank-00000.safetensors", "rank-00001.safetensors", "state.json"]


@pytest.mark.parametrize("name", ["whole", "to_one", "from_one", "to_hybrid", "to_none"])
def test_another_number_of_ranks_follows_the_same_curve(
    runs: Path, whole_run: tuple[Path, TrainResult], name: str
) -> None:
    if name == "to_one":
        tiny_train(runs / name)
    expected, found = curve(whole_run[0]), curve(runs / name)
    assert len(found) == len(expected) == 5
    for (at, _, values), (known, _, reference) in zip(found, expected, strict=True):
        assert at == known
        assert values == pytest.approx(reference, rel=1e-5, abs=1e-7)
        assert values["loss"] == pytest.approx(reference["loss"], rel=3e-7)
    one, two = (checkpoint.latest(path)[0] for path in (whole_run[0], runs / name))
    assert one is not None
    assert two is not None
    for key, value in read(one).items():
        torch.testing.assert_close(read(two)[key], value, rtol=1e-3, atol=1e-5, msg=key)


def test_every_rank_has_the_whole_model_in_the_end(runs: Path) -> None:
    first, second = (torch.load(runs / f"model.{rank}.pt") for rank in (0, 1))
    found, _ = checkpoint.latest(runs / "whole")
    assert found is not None
    saved = read(found)
    for name, value in first.items():
        assert torch.equal(value, saved[f"model.{name}"])
        assert torch.equal(value, second[name])


def test_other_ranks_are_told_of_in_the_journal(runs: Path, whole_run: Any) -> None:
    told = (runs / "to_none" / "journal.jsonl").read_text()
    changed = [json.loads(line) for line in told.splitlines() if "environment_changed" in line]
    assert changed[0]["changed"] == ["sharding: hybrid -> none"]


def odd_shapes(rank: int, root: Path) -> None:
    """A row that only one rank has, rows that do not divide, and what all have."""
    join(rank, root)
    mesh = init_device_mesh("cpu", (2,))
    value = torch.arange(15.0).reshape(5, 3)
    tensors = {
        "one": distribute_tensor(value[:1], mesh, [Shard(0)]),
        "odd": distribute_tensor(value, mesh, [Shard(0)]),
        "all": value.clone(),
    }
    with world() as ranks:
        saver = Saver(root, ranks, keep=2)
        saver.save(tensors, {"of": rank}, step=1)
        for tensor in tensors.values():
            tensor.zero_()
        saver.wait()
        found, damaged = checkpoint.latest(root, ranks)
        assert found is not None
        assert (found.state["of"], damaged) == (0, [])
        found.load(tensors)
        assert torch.equal(whole(tensors["one"]), value[:1])
        assert torch.equal(whole(tensors["odd"]), value)
        assert torch.equal(tensors["all"], value)

        saver.save(tensors, {}, step=2)
        saver.wait()
        if rank == 0:
            file = root / "ckpt" / "step-00000002" / "rank-00001.safetensors"
            file.write_bytes(file.read_bytes()[:-1])
        dist.barrier()
        (root / f"told.{rank}").write_text(str(checkpoint.latest(root, ranks)[1]))
        if rank == 1:  # a rank whose disk takes nothing
            (root / "file").write_text("")
            saver.folder = root / "file"
        try:
            saver.save(tensors, {}, step=3)
            saver.wait()
        except ArtifactError as error:
            (root / f"failed.{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_shards_of_odd_shapes_and_faults_of_one_rank(tmp_path: Path) -> None:
    start_processes(odd_shapes, (tmp_path,), nprocs=2, start_method="spawn")
    for rank in (0, 1):
        # Each rank reads a part of the files; both know of the damage.
        told = (tmp_path / f"told.{rank}").read_text()
        assert "step-00000002/rank-00001" in told
        assert "bytes instead of" in told
        failed = (tmp_path / f"failed.{rank}").read_text()
        assert failed.startswith("the checkpoint of step 3 could not be written")
        assert "(rank 1: [Errno 20] Not a directory" in failed
    names = sorted(path.name for path in (tmp_path / "ckpt").iterdir())
    assert names == ["step-00000001", "step-00000002"]
