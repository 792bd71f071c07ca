"""What `test_device.py` compares with the processor, done on the pretended device, as a command:
python -m tests.train.on_device DIRECTORY
"""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from abf.decode.config import AbfStrategy, DecoderConfig, FixedExtent
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.loss import ar_charges, block_charges, scatter
from abf.errors import Interrupted
from abf.train import loop
from abf.train.parallel import World
from abf.train.step import StepResult, Trainer
from tests.decode.runs import AR as AR_DECODER
from tests.decode.runs import block_config, run, tokens
from tests.decode.tiny import edit_model, tiny_prompts
from tests.train.pretend import OnDevice, pretend_device
from tests.train.test_parallel import AR, DRAFTS, PATH, TOLD, trainer_of
from tests.train.test_teacher import TAUGHT
from tests.train.tiny_run import tiny_train, write_rows

PAIR = {"objective": {"kind": "block", "corruption": {"kind": "masked", "pair": True}}}
STEPS: dict[str, dict[str, Any]] = {
    "ar": AR,
    "masks": {"batch_rows": 3, "micro_rows": 2},
    "pair": PAIR,
    "path": PATH,
    "drafts": DRAFTS,
    "granularity": TOLD,
    "recomputed": {"checkpoint_activations": True},
}
DECODERS = {
    "ar": AR_DECODER,
    "threshold": block_config(0.1),
    "abf": DecoderConfig(
        strategy=AbfStrategy(fill=0.2, complete=0.1), extent=FixedExtent(length=6),
        precision="fp32", max_steps_per_block=16, reopen=-3.0,
    ),
}  # fmt: skip
RUNS: dict[str, dict[str, Any]] = {"masks": {}, "drafts": DRAFTS, "taught": TAUGHT}


def stepped(trainer: Trainer) -> tuple[list[StepResult], dict[str, Tensor]]:
    """Two steps, and the weights after them."""
    results = [trainer.step(number) for number in range(2)]
    return results, {name: p.detach().cpu() for name, p in trainer.optimiser.parameters.items()}


def decoded(directory: Path, device: torch.device) -> dict[str, list[list[int]]]:
    """Greedy texts of a model that edits, by strategy."""
    directory.mkdir()
    model = edit_model().to(device)
    return {
        name: tokens(run(directory / name, cfg, model, tiny_prompts()))
        for name, cfg in DECODERS.items()
    }


def charged(packed: Path, device: torch.device) -> dict[str, Any]:
    """Nats of every slot, as the bound is reported, by a model that edits."""
    trainer = trainer_of(packed, PATH, World(device=device))
    objective, batch = trainer.cfg.objective, trainer.rows.rows(np.arange(4))
    assert objective.kind == "block"
    corruption = build_corruption(objective.corruption, mask_id=trainer.model.mask_id)
    noised = corruption.apply(batch, seed=0, epochs=np.zeros(4, dtype=np.int64))
    with torch.inference_mode():
        charges = block_charges(
            trainer.model, batch, noised, loss=objective.loss, backend="tiles",
            terms=("nelbo", "length"), aligned=True,
        )  # fmt: skip
        charges["ar"] = ar_charges(trainer.model, batch, backend="tiles")
        return {name: scatter(charge, batch) for name, charge in charges.items()}


def refusals() -> Iterator[bool]:
    """Whether what a GPU refuses is refused."""
    there = torch.ones(3, device="pretend")
    for wrong in (lambda: there + torch.ones(3), there.numpy):
        try:
            wrong()
        except (RuntimeError, TypeError):
            yield True
        else:
            yield False


def main() -> None:
    """Steps and runs; results below the directory."""
    root = Path(sys.argv[1])
    packed = write_rows(root / "steps")
    with pretend_device() as device:
        assert list(refusals()) == [True, True]
        for name, changes in STEPS.items():
            trainer = trainer_of(packed, changes, World(device=device))
            assert all(isinstance(p.data, OnDevice) for p in trainer.model.parameters())
            torch.save(stepped(trainer), root / "steps" / f"{name}.pt")
        (root / "decoded.json").write_text(json.dumps(decoded(root / "decode", device)))
        np.savez(root / "charged.npz", **charged(packed, device))
        loop.own_device = lambda _: device
        for name, changes in RUNS.items():
            tiny_train(root / "whole" / name, changes)
            stopped(root / "parts" / name, changes)
            model = tiny_train(root / "parts" / name, changes).model
            assert {p.device.type for p in model.parameters()} == {"cpu"}


def stopped(directory: Path, changes: dict[str, Any]) -> None:
    """A run that a signal ends in its fifth step."""
    real = Trainer.step

    def with_signal(self: Trainer, number: int) -> StepResult:
        if number == 4:
            signal.raise_signal(signal.SIGTERM)
        return real(self, number)

    Trainer.step = with_signal
    try:
        tiny_train(directory, changes)
    except Interrupted:
        return
    finally:
        Trainer.step = real
    raise AssertionError("the signal was not heard")


if __name__ == "__main__":
    main()
