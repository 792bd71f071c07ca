"""One optimiser step after another: rows, noise, loss, gradients over ranks, clipping, AdamW.

Letters: L row length. Steps count from 0. A step is a pure function of its number, the seed, the
weights and the optimiser's state: nothing else is carried from one to the next.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from abf.data.loader import PackedBatch, PackedRows, row_indices
from abf.diffusion.corrupt.base import Corrupter, Noised, build_corruption
from abf.diffusion.corrupt.path import PathNoised
from abf.diffusion.flops import counting
from abf.diffusion.policy.watch import COMPLETE_COUNTS, EDIT_COUNTS
from abf.diffusion.regroup import drop_history, regroup
from abf.diffusion.terms import Term, count_terms, term_weights
from abf.errors import ConfigError, DivergenceError
from abf.model.attention import check_backend
from abf.model.transformer import Transformer
from abf.train.config import TrainConfig
from abf.train.faults import check_fit, no_numbers, told_rows
from abf.train.forward import Losses
from abf.train.lengths import bin_names, count_lengths
from abf.train.optim import Optimiser, learning_rate
from abf.train.parallel import World
from abf.train.shard import ShardedOptimiser, enter, shard

WATCHED = {"edit": EDIT_COUNTS, "complete": COMPLETE_COUNTS}
"""What the terms that watch heads count."""
FLOPS = "flops"
"""Name of the sum of model FLOPs."""


@dataclass(frozen=True)
class StepResult:
    """What a step measured, over all ranks and micro-batches."""

    loss: float
    """Nats: weighted sum of the terms, each divided by its own count."""
    sums: dict[str, float]
    """Nats of each term."""
    counts: dict[str, int]
    """Tokens or blocks each term was charged for."""
    tokens: int
    """Tokens the likelihood charges for."""
    masked: int
    """Masked ones of them; 0 for the AR objective."""
    watch: dict[str, float]
    """Counts of how well the edit heads do (`abf.diffusion.policy.watch`), and of the lengths of
    blocks (`abf.train.lengths`); what there is of them."""
    flops: float
    """Model FLOPs, forward and backward (`abf.diffusion.flops`)."""
    grad_norm: float
    """Global norm before clipping."""
    lr: float
    """Learning rate of the update."""


class Trainer:
    """Model, optimiser, data and noise of a run.

    Raises:
        ConfigError: the precision was never resolved, there are fewer rows than ranks, or the
            attention back end does not work on the device.
        ArtifactError: the packed rows do not fit the model; names both sides.
    """

    def __init__(
        self,
        cfg: TrainConfig,
        *,
        seed: int,
        model: Transformer,
        packed: Path,
        world: World | None = None,
    ) -> None:
        if cfg.precision == "auto":
            raise ConfigError(
                "train.precision is still 'auto'; it is resolved when a run is planned: write "
                "'fp32' or 'bf16' (bf16 only where the processor has the instructions)"
            )
        self.cfg, self.seed, self.model, self.path = cfg, seed, model, packed
        self.world = World() if world is None else world
        self.device = self.world.device
        model.to(self.device)
        check_backend(cfg.attention, model.config, device=self.device, precision=cfg.precision)
        self.part = self.world.share(cfg.batch_rows)
        self.most_rows = math.ceil(cfg.batch_rows / self.world.size)
        self.rows = PackedRows(packed)
        check_fit(self.rows, model, packed)
        self.loss = cfg.objective.loss if cfg.objective.kind == "block" else None
        self.weights = term_weights(self.loss)
        self.watched = [name for term in self.weights for name in WATCHED.get(term, ())]
        self.bins = [] if self.loss is None else bin_names(model.max_block)
        self.totals = [*self.weights, "masked", *self.watched, *self.bins, FLOPS]
        """What a step adds up over micro-batches and ranks."""
        self._corruptions: dict[float, Corrupter] = {}
        """By the end of their stage."""
        self.losses = Losses(model, cfg, self.loss)
        sharding = cfg.parallel.sharding
        self.sharded = self.world.size > 1 and sharding != "none"
        if self.sharded and sharding != "none":
            shard(self.losses, model, self.world, sharding)
        self.optimiser = (ShardedOptimiser if self.sharded else Optimiser)(model, cfg.optim)
        self.tokens_per_step = cfg.batch_rows * self.rows.row_length
        self.steps = math.ceil(cfg.tokens / self.tokens_per_step)
        model.train()

    def step(self, number: int) -> StepResult:
        """Do step `number`.

        Raises:
            DivergenceError: loss or gradient is not finite; the weights were not touched.
        """
        sums, counts, masked, watch = self.gradients(number)
        loss = sum(w * sums[name] / max(counts[name], 1) for name, w in self.weights.items())
        norm = self.optimiser.clip()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise DivergenceError(self._divergence(number, loss, norm))
        lr = learning_rate(number, steps=self.steps, cfg=self.cfg.optim)
        self.optimiser.step(lr)
        tokens = counts["nelbo" if "nelbo" in counts else "ar"]
        flops = watch.pop(FLOPS)
        return StepResult(loss, sums, counts, tokens, masked, watch, flops, norm, lr)

    def gradients(
        self, number: int
    ) -> tuple[dict[str, float], dict[str, int], int, dict[str, float]]:
        """Fill the gradient buffer for step `number`, summed over micro-batches and ranks.

        Returns:
            sum of each term (nats), count of each term, masked tokens, and counts of what else is
            watched: heads, lengths of blocks, FLOPs; all over all ranks.
        """
        everywhere = self.row_indices(number)
        rows, epochs = (each[self.part] for each in everywhere)
        batch = self._grouped(number, self.rows.rows(rows), epochs)
        corruption, seen = self._corruption(number), self._taught(number, batch, epochs)
        names = list(self.weights)
        # Before any backward: what the sums are divided by counts every rank and micro-batch.
        local = count_terms(batch, self.loss)
        counted = self.world.sum_(torch.tensor([local[name] for name in names]))
        counts = dict(zip(names, counted.tolist(), strict=True))

        self.optimiser.zero_grad()
        totals = self._nothing()
        if self.bins:
            lengths = count_lengths(batch, self.model.max_block)
            totals[-1 - len(self.bins) : -1] = torch.from_numpy(lengths).to(self.device)
        size = self.cfg.micro_rows or len(rows)
        for start in range(0, self.most_rows if self.sharded else len(rows), size):
            part = slice(start, start + size)
            micro = batch.take(part)
            if any(count_terms(micro, self.loss).values()):
                taught = None if seen is None else seen.take(part)
                totals += self._micro_batch(micro, epochs[part], counts, corruption, taught)
            elif self.sharded and any(counts.values()):
                # No row, or padding alone, but the others need this rank in their collectives;
                # what it measures serves nobody.
                self._micro_batch(*self._filler(*everywhere), counts, corruption, share=0.0)
        self._local = totals.cpu()
        self.optimiser.sum_gradients(self.world)
        summed = self.world.sum_(self._local.clone()).tolist()
        found = dict(zip(self.totals, summed, strict=True))
        sums, masked = {name: found.pop(name) for name in names}, found.pop("masked")
        return sums, counts, int(masked), found

    def row_indices(self, number: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows of step `number` over all ranks, and how often each was seen before."""
        return row_indices(
            number, batch_rows=self.cfg.batch_rows, n_rows=len(self.rows), seed=self.seed
        )

    def _corruption(self, number: int) -> Corrupter | None:
        """How the rows of a step are noised."""
        objective = self.cfg.objective
        if objective.kind != "block":
            return None
        stage = objective.stage(number, self.steps)
        if stage.until not in self._corruptions:
            self._corruptions[stage.until] = build_corruption(
                stage.corruption or objective.corruption, mask_id=self.model.mask_id
            )
        return self._corruptions[stage.until]

    def _grouped(self, number: int, batch: PackedBatch, epochs: NDArray[np.int64]) -> PackedBatch:
        """Rows of a step, in its blocks, and which of these lose what lies before them."""
        objective = self.cfg.objective
        if objective.kind != "block":
            return batch
        stage = objective.stage(number, self.steps)
        longest = self.model.config.max_block
        batch = regroup(
            batch, cap=stage.block_cap, join=stage.join, longest=longest, seed=self.seed,
            epochs=epochs, granularity=stage.granularity, known=self.model.config.granularities,
        )  # fmt: skip
        return drop_history(batch, stage.history, seed=self.seed, epochs=epochs)

    @property
    def teaching(self) -> int | None:
        """Step at which the model becomes its own teacher, if it does."""
        objective = self.cfg.objective
        if objective.kind != "block" or objective.distil_from is None:
            return None
        return max(1, math.ceil(objective.distil_from * self.steps))

    def _taught(
        self, number: int, batch: PackedBatch, epochs: NDArray[np.int64]
    ) -> PackedBatch | None:
        """Rows of a step in the teacher's blocks, or None while there is no teacher."""
        if (first := self.teaching) is None or number < first:
            return None
        assert self.losses.teacher, "the loop gives the teacher"
        return self._grouped(first - 1, batch, epochs)

    def _micro_batch(
        self,
        batch: PackedBatch,
        epochs: NDArray[np.int64],
        counts: dict[str, int],
        corruption: Corrupter | None,
        taught: PackedBatch | None = None,
        share: float = 1.0,
    ) -> torch.Tensor:
        """Add the gradients of some rows; returns the terms' sums, the masked tokens, and counts of
        what is watched."""
        totals = self._nothing()
        for view in range(1 if corruption is None else corruption.views):
            noised = None
            if corruption is not None:
                noised = corruption.apply(batch, seed=self.seed, epochs=epochs, draw=view)
            with counting() as done:
                loss, terms, noised = self.losses(
                    batch, noised, counts, ("nelbo", "distil") if view else None,
                    (self.seed, epochs), taught,
                )  # fmt: skip
            if self.sharded:
                # FSDP2 takes the mean over ranks; gloo knows no other (notes/feasibility.md §3).
                loss = enter(loss * (share * self.world.size), self.model)
            loss.backward()
            measured = self._measured(terms, noised)
            totals[: len(measured)] += measured
            totals[-1] += done.flops
        return totals

    def _nothing(self) -> torch.Tensor:
        """Zeros to add up on, on the device: they are fetched once a step."""
        return torch.zeros(len(self.totals), dtype=torch.float64, device=self.device)

    def _measured(self, terms: dict[str, Term], noised: Noised | PathNoised | None) -> torch.Tensor:
        """Sums of the terms, masked tokens, and counts of what is watched."""
        zero = torch.zeros(1, dtype=torch.float64, device=self.device)
        sums = [
            terms[name].sum.detach().double()[None] if name in terms else zero
            for name in self.weights
        ]
        masked = 0 if noised is None else _masked(noised, self.model.mask_id)
        watch = [
            term.watch if (term := terms.get(name)) and term.watch is not None
            else zero.expand(len(WATCHED[name]))
            for name in self.weights if name in WATCHED
        ]  # fmt: skip
        return torch.cat((*sums, zero + masked, *watch))

    def _filler(
        self, rows: NDArray[np.int64], epochs: NDArray[np.int64]
    ) -> tuple[PackedBatch, NDArray[np.int64]]:
        """A row of this step that is charged for something, and its epoch."""
        for at in range(len(rows)):
            batch = self.rows.rows(rows[at : at + 1])
            if any(count_terms(batch, self.loss).values()):
                return batch, epochs[at : at + 1]
        raise AssertionError("the step charges for something, so one of its rows does")

    def _divergence(self, number: int, loss: float, norm: float) -> str:
        rows, _ = self.row_indices(number)
        local = dict(zip(self.weights, self._local.tolist(), strict=False))
        origin, ranks = no_numbers(self.world, local)
        if ranks:
            rows = np.concatenate([rows[self.world.share(len(rows), rank)] for rank in ranks])
        return (
            f"step {number + 1} of {self.steps}: loss {loss}, gradient norm {norm}{origin}; its "
            "update was not applied and no checkpoint holds it. Batch: "
            f"{told_rows(self.rows, rows, self.path)}. The same "
            "command would meet it again: look at that text, or lower train.optim.lr or "
            "train.optim.clip_norm"
        )


def _masked(noised: Noised | PathNoised, mask_id: int) -> int:
    """Masked slots; padding, which depends on how rows were grouped, holds MASK, too."""
    return int(((noised.noisy_ids == mask_id) & (noised.block_start >= 0)).sum())
