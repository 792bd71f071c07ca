"""Two gloo ranks against one: the same sums, gradients and curves, and they stop together."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from abf.errors import ConfigError, Interrupted
from abf.model.store import with_edit_heads, with_granularities
from abf.train import checkpoint
from abf.train.parallel import World, world
from abf.train.shard import RANKS_PER_NODE, shard, whole
from abf.train.step import StepResult, Trainer
from tests.train import tiny_run
from tests.train.equality import curve, events
from tests.train.ranks import join
from tests.train.tiny_run import new_model, tiny_config, tiny_train, write_rows

AR: dict[str, Any] = {"objective": {"kind": "ar"}}
PATH: dict[str, Any] = {"objective": {"kind": "block", "corruption": {"kind": "path"}}}
DRAFTS: dict[str, Any] = {
    "objective": {
        "kind": "block",
        "corruption": {"kind": "path", "drafts": {"share": 0.5, "own": 0.5, "own_steps": 2}},
        "loss": {"edit_weight": 1.0, "complete_weight": 1.0},
    }
}
TOLD: dict[str, Any] = {
    "objective": {"kind": "block", "stages": [{"until": 1, "granularity": {"lengths": [2, 6]}}]}
}
FULL: dict[str, Any] = {"parallel": {"sharding": "full"}}
HYBRID: dict[str, Any] = {"parallel": {"sharding": "hybrid"}}
SETTINGS: list[dict[str, Any]] = [
    {},
    AR,
    {"batch_rows": 3},  # one rank has two rows, the other one
    {"batch_rows": 5, "micro_rows": 2},
    FULL,
    FULL | AR,  # no rank's loss reads the length head
    FULL | PATH,
    FULL | {"batch_rows": 3, "micro_rows": 1},  # one rank has a pass less
    FULL | {"batch_rows": 4, "micro_rows": 2, "checkpoint_activations": True},
    HYBRID | {"checkpoint_activations": True},
    HYBRID | PATH,
    DRAFTS,
    FULL | DRAFTS,
    TOLD,
    FULL | TOLD | {"micro_rows": 1},
]


def trainer_of(packed: Path, changes: dict[str, Any], ranks: World | None = None) -> Trainer:
    cfg = tiny_config(**changes)
    model = with_edit_heads(new_model()) if "corruption" in str(changes) else new_model()
    if cfg.objective.kind == "block":
        model = with_granularities(model, cfg.objective.granularities)
    return Trainer(cfg, seed=0, model=model, packed=packed, world=ranks)


def gradients(trainer: Trainer) -> Tensor:
    found = [p.grad for p in trainer.optimiser.parameters.values()]
    return torch.cat([whole(grad).flatten() for grad in found if grad is not None])


def write_gradients(rank: int, directory: Path) -> None:
    join(rank, directory)
    os.environ[RANKS_PER_NODE] = "1"
    with world() as ranks:
        for number, changes in enumerate(SETTINGS):
            trainer = trainer_of(directory / "train.arrow", changes, ranks)
            found = trainer.gradients(1)
            all_gradients = gradients(trainer)
            held = [
                p.to_local() if isinstance(p, DTensor) else p for p in trainer.model.parameters()
            ]
            results = {"found": found, "gradients": all_gradients, "norm": trainer.optimiser.clip()}
            results["held"] = sum(p.numel() for p in held)
            torch.save(results, directory / f"{number}.{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_have_the_gradients_of_one(tmp_path: Path) -> None:
    packed = write_rows(tmp_path)
    start_processes(write_gradients, (tmp_path,), nprocs=2, start_method="spawn")
    for number, changes in enumerate(SETTINGS):
        one = trainer_of(packed, changes)
        sums, counts, masked, watch = one.gradients(1)
        first, second = (torch.load(tmp_path / f"{number}.{rank}.pt") for rank in (0, 1))
        assert first["found"] == second["found"]
        assert torch.equal(first["gradients"], second["gradients"])
        assert first["found"][0] == pytest.approx(sums, rel=1e-6)
        assert first["found"][1:3] == (counts, masked)
        assert first["found"][3] == pytest.approx(watch, rel=1e-6)
        expected = one.optimiser.gradients
        torch.testing.assert_close(first["gradients"], expected, rtol=1e-4, atol=1e-6)
        # Ranks of two nodes with one each: shards of a node are whole weights.
        shared = first["held"] + second["held"] == len(expected)
        assert shared == (changes.get("parallel") == FULL["parallel"])
        assert shared or first["held"] == second["held"] == len(expected)
        assert first["norm"] == second["norm"]
        assert first["norm"] == pytest.approx(float(torch.linalg.vector_norm(expected)), rel=1e-5)


def stop_one_rank(rank: int, directory: Path) -> None:
    join(rank, directory)
    real = Trainer.step

    def with_signal(self: Trainer, number: int) -> StepResult:
        if rank == 1 and number == 4:
            os.kill(os.getpid(), signal.SIGUSR1)
        return real(self, number)

    Trainer.step = with_signal  # this process ends with the function
    try:
        tiny_train(directory)
    except Interrupted as error:
        (directory / f"told.{rank}").write_text(str(error))
    dist.destroy_process_group()


def test_a_signal_to_one_rank_stops_all(tmp_path: Path) -> None:
    write_rows(tmp_path)
    start_processes(stop_one_rank, (tmp_path,), nprocs=2, start_method="spawn")
    assert "a signal to another rank after step 5" in (tmp_path / "told.0").read_text()
    assert "SIGUSR1 after step 5" in (tmp_path / "told.1").read_text()
    found, _ = checkpoint.latest(tmp_path)
    assert found is not None
    assert found.step == 5


def test_torchrun_follows_the_curve_of_one_process(
    tmp_path: Path, whole_run: tuple[Path, Any]
) -> None:
    write_rows(tmp_path)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    done = subprocess.run(
        [*launch, tiny_run.__file__, str(tmp_path), json.dumps({})],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    expected = curve(whole_run[0])
    found = curve(tmp_path)
    assert [at for at, _, _ in found] == [at for at, _, _ in expected]
    for (_, tokens, values), (_, known, reference) in zip(found, expected, strict=True):
        assert tokens == known
        assert values == pytest.approx(reference, rel=1e-5, abs=1e-6)
    assert events(tmp_path) == ["start", *["checkpoint"] * 4, "finished"]


@pytest.mark.parametrize(("size", "locals_"), [(3, [2, 2, 2]), (4, [2, 1, 1, 2])])
def test_nodes_of_other_sizes_take_no_hybrid_shards(
    monkeypatch: pytest.MonkeyPatch, size: int, locals_: list[int]
) -> None:
    """Three ranks in nodes of two, and nodes of two beside nodes of one; each rank refuses."""
    monkeypatch.setattr(World, "gather", lambda self, value: locals_)
    monkeypatch.setenv(RANKS_PER_NODE, str(locals_[0]))
    with pytest.raises(ConfigError, match=rf"'hybrid', but {size} ranks are not nodes of equal"):
        shard(torch.nn.Linear(2, 2), new_model(), World(0, size), "hybrid")


def test_an_incomplete_environment_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_PORT", "1")
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR is not set"), world():
        pass
