"""A checkpoint against a bare `torch.save` of the same tensors: what the training waits for.

On this disk, everything in one process, the ways interleaved; both flush to disk. The trainer's
own saver (`abf.train.saver`) copies, which the training waits for, and writes while the next step
is done; the work of both is counted in CPU seconds.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from abf.files import fsync_path
from abf.model.transformer import Transformer
from abf.train.config import ArObjective
from abf.train.parallel import World
from abf.train.runtime import settings
from abf.train.saver import Saver
from abf.train.step import Trainer
from benchmarks.bench_train import cases, write_rows
from benchmarks.statistics import Row, ratio_row


def run(quick: bool = False) -> list[Row]:
    """Rows of the benchmark table."""
    case = cases(quick)[0]
    rounds = 3 if quick else 15
    folder = tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-checkpoint-")
    with folder as name, settings(threads=1):
        root = Path(name)
        write_rows(root / "rows", vocabulary=case.model.vocab_size, length=case.row_length)
        model = Transformer(case.model)
        model.initialise(torch.Generator().manual_seed(0))
        trainer = Trainer(case.train(ArObjective()), seed=0, model=model, packed=root / "rows")
        trainer.step(0)  # AdamW's state is there from now on
        tensors = {name: p.detach() for name, p in trainer.optimiser.parameters.items()}
        tensors |= trainer.optimiser.state()
        wall, cpu = _measure(trainer, tensors, root, rounds)
    count = sum(p.numel() for p in trainer.optimiser.parameters.values())
    detail = (
        f"{count / 1e6:.1f}M parameters and AdamW's moments, fp32, fsync on both sides, {rounds} "
        "rounds"
    )
    work = [beside - step for beside, step in zip(cpu["beside"], cpu["step"], strict=True)]
    return [
        ratio_row("checkpoint: training waits / torch.save", wall["save"], wall["bare"],
                  f"{detail}, wall-clock; goal at most 1.2"),
        ratio_row("checkpoint: work in all / torch.save", work, cpu["bare"],
                  f"{detail}, CPU seconds, hashes included"),
    ]  # fmt: skip


Times = dict[str, list[float]]
"""Seconds of each round, by what was done."""


def _measure(
    trainer: Trainer, tensors: Mapping[str, Tensor], root: Path, rounds: int
) -> tuple[Times, Times]:
    """Wall-clock and CPU seconds."""
    saver = Saver(root / "run", World(), keep=2)
    wall: Times = {}
    cpu: Times = {}

    def measure(name: str, work: Callable[[], object]) -> None:
        began, busy = time.perf_counter(), time.process_time()
        work()
        wall.setdefault(name, []).append(time.perf_counter() - began)
        cpu.setdefault(name, []).append(time.process_time() - busy)

    for number in range(1, rounds + 1):

        def beside(number: int = number) -> None:
            measure("save", lambda: saver.save(tensors, {}, step=number))
            trainer.step(2 * number + 1)
            saver.wait()

        measure("bare", lambda: _bare(tensors, root / "bare.pt"))
        measure("step", lambda at=2 * number: trainer.step(at))
        measure("beside", beside)
    return wall, cpu


def _bare(tensors: Mapping[str, Tensor], path: Path) -> None:
    with open(path, "wb") as handle:
        torch.save(dict(tensors), handle)
        handle.flush()
        os.fsync(handle.fileno())
    fsync_path(path.parent)
