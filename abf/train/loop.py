"""Train a model, restartable at any step: resume, step, record, checkpoint, stop when asked.

`{run_dir}/ckpt/` holds rolling checkpoints and `{run_dir}/journal.jsonl` the metrics; both outlive
a failed job. Tokens are clean row slots, padding included; steps are counted as done (1-based).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from abf.errors import DivergenceError, Interrupted, ResumeError
from abf.model.device import own_device
from abf.model.store import (
    assemble,
    load_weights,
    save_weights,
    with_edit_heads,
    with_granularities,
)
from abf.model.transformer import Transformer
from abf.train import checkpoint
from abf.train.config import TrainConfig
from abf.train.identity import check_identity, identity_of
from abf.train.parallel import World, world
from abf.train.peak import Peak, peak
from abf.train.record import Recorder
from abf.train.runtime import differences, environment, settings
from abf.train.saver import Saver
from abf.train.shard import gathered, whole
from abf.train.signals import StopFlag, command
from abf.train.step import Trainer

TEACHER = "teacher.safetensors"
"""The model as it was when it began to teach itself, in a run's folder."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    model: Transformer
    steps: int
    """Optimiser steps done, over all attempts."""
    tokens: int
    """Clean tokens trained on."""
    seconds: float
    """Seconds of training, over all attempts."""
    first: bool
    """Whether this rank writes the result."""


def train(
    cfg: TrainConfig,
    *,
    seed: int,
    model: Transformer,
    packed: Path,
    run_dir: Path,
    label: str,
    accept: Collection[str] = (),
    peak_tflops: float | None = None,
) -> TrainResult:
    """Train to the end, from the newest whole checkpoint when there is one.

    Args:
        cfg: settings, with the precision resolved.
        seed: seed of data order and noise.
        model: initial weights; trained in place, but for a copy with the heads that its objective
            needs.
        packed: `train.arrow` of the packed data.
        run_dir: folder of checkpoints and journal; the caller holds its lock.
        label: name of the run in progress lines.
        accept: keys that may differ from the checkpoint's, as the refusal names them.
        peak_tflops: what a rank's device can do at best, 1e12 FLOPs a second; none measures it.

    Raises:
        ConfigError: settings that cannot be run.
        ArtifactError: packed rows that do not fit the model; a checkpoint that cannot be written.
        ResumeError: the checkpoint belongs to another configuration, model or data set.
        DivergenceError: the loss stopped being a number.
        Interrupted: a signal arrived; the state is saved.
    """
    if cfg.objective.kind == "block":
        model = with_edit_heads(model) if cfg.objective.edits else model
        model = with_granularities(model, cfg.objective.granularities)
    with (
        settings(threads=cfg.threads),
        world(cfg.parallel.timeout_s, own_device(cfg.device)) as ranks,
        StopFlag() as stop,
        Recorder(run_dir, label, active=ranks.first, device=ranks.device) as record,
    ):
        identity = identity_of(cfg, seed=seed, model=model, packed=packed)
        trainer = Trainer(cfg, seed=seed, model=model, packed=packed, world=ranks)
        best = peak(cfg.precision, given_tflops=peak_tflops)
        with _Run(trainer, record, run_dir, identity, best) as run:
            run.resume(accept)
            while run.done < trainer.steps and not ranks.any(
                stop.signal is not None or run.saver.failed
            ):
                run.step()
            if run.done > run.saved:
                run.save()
        ranks.barrier()
        if ranks.any(stop.signal is not None):
            reason = stop.name or "a signal to another rank"
            record.event("interrupted", step=run.done, signal=reason)
            raise Interrupted(
                f"{label}: stopped by {reason} after step {run.done} of {trainer.steps}, saved in "
                f"{run_dir / checkpoint.FOLDER}. The same command goes on from there: {command()}",
                requeue=ranks.any(stop.time_is_up),
            )
        record.event("finished", step=run.done, wall_s=run.wall_s())
        model.zero_grad(set_to_none=True)
        return TrainResult(gathered(model).cpu(), run.done, run.tokens, run.wall_s(), ranks.first)


class _Run:
    """Where a run stands, and how it goes on."""

    def __init__(
        self,
        trainer: Trainer,
        record: Recorder,
        run_dir: Path,
        identity: dict[str, Any],
        best: Peak,
    ) -> None:
        self.trainer, self.record, self.run_dir, self.best = trainer, record, run_dir, best
        self.identity = identity
        self.environment = environment(
            device=trainer.device,
            precision=trainer.cfg.precision,
            world_size=trainer.world.size,
            sharding=trainer.cfg.parallel.sharding if trainer.sharded else "none",
        )
        self.saver = Saver(run_dir, trainer.world, keep=trainer.cfg.keep_checkpoints)
        self.done = self.saved = 0
        self._before = 0.0
        self._began = time.monotonic()

    @property
    def tokens(self) -> int:
        """Clean tokens so far."""
        return self.done * self.trainer.tokens_per_step

    def wall_s(self) -> float:
        """Seconds of training so far, over all attempts."""
        return self._before + time.monotonic() - self._began

    def resume(self, accept: Collection[str]) -> None:
        """Go to the newest whole checkpoint, or stay at the beginning; says which and why."""
        ranks: World = self.trainer.world
        found, damaged = checkpoint.latest(self.run_dir, ranks)
        for text in damaged:
            self.record.warn("damaged_checkpoint", f"checkpoint skipped: {text}")
        window: Mapping[str, float] = {}
        if found is not None:
            if accepted := check_identity(found, self.identity, accept):
                self.record.warn(
                    "config_changed",
                    f"goes on after step {found.step} with what was accepted: "
                    f"{'; '.join(accepted)}",
                    changed=accepted,
                )
            state = found.state
            moments = self.trainer.optimiser.blank()
            found.load(self._tensors(moments))
            self.trainer.optimiser.load(moments)
            self.done = self.saved = found.step
            self._before, window = state["wall_s"], state["window"]
        elif damaged:
            self.record.warn("from_scratch", "no checkpoint is whole: starting from step 0")
        ranks.barrier()
        self.record.begin(
            step=self.done, steps=self.trainer.steps, window=window,
            peak=self.best.flops * ranks.size,
        )  # fmt: skip
        self.record.event(
            "start" if found is None else "resume",
            step=self.done,
            steps=self.trainer.steps,
            seed=self.trainer.seed,
            parameters=sum(p.numel() for p in self.trainer.optimiser.parameters.values()),
            environment=self.environment,
            peak_flops=self.best.flops,
            peak_source=self.best.source,
        )
        if found is not None:
            self._check_environment(found)
        self._began = time.monotonic()

    def step(self) -> None:
        """One step, its records, and a checkpoint when one is due."""
        trainer, cfg = self.trainer, self.trainer.cfg
        self._teacher()
        try:
            result = trainer.step(self.done)
        except DivergenceError as error:
            self.settle()
            self.record.event("diverged", step=self.done + 1, text=str(error))
            raise
        self.done += 1
        self.record.step(result, tokens=trainer.tokens_per_step)
        self._record_saved()
        last = self.done == trainer.steps
        if last or self.done % cfg.log_steps == 0:
            values = {"lr": result.lr}
            if trainer.loss is not None:
                # Double: weights that ran away overflow here before the next loss tells of it.
                embedding = whole(trainer.model.mask_embedding.detach()).double()
                values["mask_embedding_norm"] = float(torch.linalg.vector_norm(embedding))
            self.record.metrics(
                step=self.done, tokens=self.tokens, wall_s=self.wall_s(), values=values
            )
        if last or self.done % cfg.checkpoint_steps == 0:
            self.save()

    def _teacher(self) -> None:
        """Give the trainer its teacher when it is due: the model as it is, or as it was kept."""
        trainer, path = self.trainer, self.run_dir / TEACHER
        if trainer.teaching is None or self.done < trainer.teaching or trainer.losses.teacher:
            return
        if self.done == trainer.teaching:
            state = gathered(trainer.model).state_dict()
            weights = {name: tensor.to("cpu", copy=True) for name, tensor in state.items()}
            if trainer.world.first:
                save_weights(weights, path)
        elif path.exists():
            weights = load_weights(path)
        else:
            raise ResumeError(
                f"{path} is missing: the weights of step {trainer.teaching}, which this run learns "
                "from. Delete the run's checkpoints to train it again"
            )
        teacher = assemble(trainer.model.config, weights, path).to(trainer.device)
        trainer.losses.teacher.append(teacher.requires_grad_(False).eval())
        trainer.world.barrier()

    def save(self) -> None:
        """Begin to write a checkpoint of this step; the training goes on while it is written."""
        trainer = self.trainer
        state = {
            "identity": self.identity,
            "environment": self.environment,
            "tokens": self.tokens,
            "wall_s": self.wall_s(),
            "window": dict(self.record.window),
        }
        self.settle()
        tensors = self._tensors(trainer.optimiser.state())
        # A crash of the machine must not leave a checkpoint whose metrics are lost: sync before.
        self.saver.save(tensors, state, step=self.done, before=self.record.sync)
        self.saved = self.done

    def settle(self) -> None:
        """Wait for the checkpoint that is being written, if there is one, and record it."""
        self.saver.wait()
        self._record_saved()

    def __enter__(self) -> _Run:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """What is on its way to the disk stands, whatever happened; but who asks a second time to
        be let go (Ctrl-C) is not held up by the disk."""
        if kind is None or issubclass(kind, Exception):
            self.settle()

    def _record_saved(self) -> None:
        if (saved := self.saver.poll()) is not None:
            step, path = saved
            self.record.event("checkpoint", step=step, path=path.name)

    def _tensors(self, moments: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What a checkpoint holds: the model's own weights, and moments of the optimiser."""
        parameters = self.trainer.optimiser.parameters
        weights = {f"model.{name}": tensor.detach() for name, tensor in parameters.items()}
        return weights | {f"optimizer.{name}": tensor for name, tensor in moments.items()}

    def _check_environment(self, found: checkpoint.Checkpoint) -> None:
        changed = differences(found.state["environment"], self.environment)
        if changed:
            self.record.warn(
                "environment_changed",
                f"resume will not be bit-exact: {'; '.join(changed)}",
                changed=changed,
            )
