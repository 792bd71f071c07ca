"""Settings of training. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from abf.base import ConfigModel, Seed, Threads
from abf.diffusion.config import (
    Corruption,
    GranularityConfig,
    HistoryConfig,
    LossConfig,
    MaskedCorruption,
)
from abf.model.config import AttentionBackend, ImportedBase, ShapeConfig

Decay = Annotated[float, Field(ge=0, lt=1)]
"""Factor of a running mean."""


class OptimConfig(ConfigModel):
    """AdamW; learning rate as a pure function of the step."""

    lr: float = Field(default=1e-3, gt=0)
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape after the warm-up."""
    warmup_fraction: float = Field(default=0.05, ge=0, lt=1)
    """Share of all steps spent rising linearly to the peak."""
    final_fraction: float = Field(default=0.1, ge=0, le=1)
    """Learning rate at the last step, as a share of the peak."""
    betas: tuple[Decay, Decay] = (0.9, 0.95)
    """AdamW moments."""
    weight_decay: float = Field(default=0.1, ge=0)
    """Decoupled decay; matrices only."""
    clip_norm: float = Field(default=1.0, gt=0)
    """Largest global gradient norm."""


class ArObjective(ConfigModel):
    """Next-token prediction on the clean stream alone: the AR trainer, and the AR arm."""

    kind: Literal["ar"] = "ar"

    @property
    def bound(self) -> bool:
        """Whether its loss of a text is a likelihood bound: there is no block loss to doubt."""
        return True


class Stage(ConfigModel):
    """A part of a run with settings of its own."""

    until: float = Field(gt=0, le=1)
    """Share of the run's steps at which it ends."""
    corruption: Corruption | None = None
    """How clean blocks become noisy; none: as the objective says."""
    block_cap: int | None = Field(default=None, ge=1)
    """Blocks are cut to this many tokens; none leaves them whole."""
    join: float = Field(default=0.0, ge=0, le=1)
    """Probability that a block is joined to the one before it while both fit the longest block."""
    granularity: GranularityConfig | None = None
    """Join blocks to a mean length that each document draws, and tell the model; none does not."""
    history: HistoryConfig | None = None
    """Blocks that lose what lies before them; none does not. Such a stage trains on no bound of the
    model that sees everything."""

    def model_post_init(self, context: object) -> None:
        if self.granularity is not None and self.join:
            raise ValueError(
                f"join={self.join} and granularity both say how blocks are joined: leave join out"
            )


class BlockObjective(ConfigModel):
    """Block diffusion on two streams."""

    kind: Literal["block"] = "block"
    corruption: Corruption = MaskedCorruption()
    """How clean blocks become noisy; the bound is reported under it."""
    loss: LossConfig = LossConfig()
    """Terms and their weights."""
    stages: tuple[Stage, ...] = ()
    """Parts of the run, in order; the last ends at 1. None: the whole run is alike."""
    distil_from: float | None = Field(default=None, gt=0, lt=1)
    """Share of the run's steps at which the model becomes its own teacher: from then on it is to
    agree with what it was, reading the blocks of the stage before. None: no teacher."""

    def stage(self, step: int, steps: int) -> Stage:
        """Settings of a step (from 0) of a run of so many."""
        for stage in self.stages:
            if step < stage.until * steps:
                return stage
        return Stage(until=1.0)

    @property
    def corruptions(self) -> tuple[Corruption, ...]:
        """What a step may train on: its own corruption, and those of its stages."""
        return self.corruption, *(s.corruption for s in self.stages if s.corruption is not None)

    @property
    def bound(self) -> bool:
        """Whether the block loss is an unbiased draw of the bound in every stage."""
        forgets = any(stage.history is not None for stage in self.stages)
        return not forgets and all(corruption.bound for corruption in self.corruptions)

    @property
    def edits(self) -> bool:
        """Whether the model needs the heads that edit."""
        return self.corruption.kind == "path"

    @property
    def granularities(self) -> tuple[int, ...]:
        """Mean block lengths that the model is told of in some stage, in tokens."""
        found = {n for s in self.stages if s.granularity for n in s.granularity.lengths}
        return tuple(sorted(found))

    def model_post_init(self, context: object) -> None:
        ends = [stage.until for stage in self.stages]
        if ends and (ends != sorted(set(ends)) or ends[-1] != 1):
            raise ValueError(f"stages must end one after another, the last at 1, not {ends}")
        if (self.distil_from is None) != (self.loss.distil_weight == 0):
            raise ValueError(
                f"distil_from={self.distil_from} and loss.distil_weight="
                f"{self.loss.distil_weight} go together: a teacher, and what it counts"
            )
        if self.distil_from is not None and self.corruption.kind != "masked":
            raise ValueError(
                f"distil_from={self.distil_from}: a teacher speaks of masks in their places, not "
                f"of a {self.corruption.kind}; use corruption.kind masked"
            )
        if len(kinds := {corruption.kind for corruption in self.corruptions}) > 1:
            raise ValueError(
                f"stages mix corruptions ({', '.join(sorted(kinds))}): a path with late: 0 and "
                "wrong: 0 is one of masks alone, and its model has the heads of later stages"
            )
        drafts = any(c.kind == "path" and c.drafts is not None for c in self.corruptions)
        weights = {name: getattr(self.loss, name) for name in ("edit_weight", "complete_weight")}
        if drafts and not any(weights.values()):
            raise ValueError(
                "corruption.drafts teach nothing while loss.edit_weight and loss.complete_weight "
                "are 0: give them weights, or leave drafts out"
            )
        if not drafts and any(weights.values()):
            given = ", ".join(f"loss.{name}={value}" for name, value in weights.items() if value)
            raise ValueError(f"{given}, but nothing drafts: set corruption.drafts (kind: path)")


class ParallelConfig(ConfigModel):
    """How several ranks share the work; it changes no result beyond the last bits."""

    sharding: Literal["none", "full", "hybrid"] = "none"
    """Where weights, gradients and optimiser state live (FSDP2): `none`, whole on every rank;
    `full`, in shards over all ranks; `hybrid`, in shards over the ranks of a node, each node
    holding them all. One rank alone holds everything."""
    timeout_s: float = Field(default=600.0, gt=0)
    """Seconds a rank waits for the others before it stops and names the one that hangs."""


Objective = Annotated[ArObjective | BlockObjective, Field(discriminator="kind")]


class TrainConfig(ConfigModel):
    """One training run, in clean tokens; everything random comes from `seed` and counters."""

    objective: Objective = BlockObjective()
    """What is minimised."""
    tokens: int = Field(default=200_000, ge=1)
    """Clean tokens to train on (row slots, padding included); rounded up to whole steps."""
    batch_rows: int = Field(default=8, ge=1)
    """Rows a step, over all ranks and micro-batches."""
    micro_rows: int | None = Field(default=None, ge=1)
    """Rows a forward pass; smaller than batch_rows / ranks accumulates gradients. None: all."""
    optim: OptimConfig = OptimConfig()
    """Optimiser and learning rate."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is resolved once when the run is planned and written into its config.json."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """What a rank computes on; `auto`: on a GPU where the process sees one."""
    threads: Threads = 1
    """CPU threads; part of the config because it changes the last bits."""
    attention: AttentionBackend = "tiles"
    """Attention back end, chosen explicitly."""
    checkpoint_activations: bool = False
    """Compute each layer again in the backward pass instead of keeping what it needs: less memory,
    about a third more time, the same numbers."""
    parallel: ParallelConfig = ParallelConfig()
    """How several ranks share the work."""
    checkpoint_steps: int = Field(default=50, ge=1)
    """Steps between checkpoints."""
    keep_checkpoints: int = Field(default=2, ge=2)
    """How many rolling checkpoints stay on disk."""
    log_steps: int = Field(default=10, ge=1)
    """Steps between journal records."""


class PretrainedBase(ConfigModel):
    """Train a small AR model from scratch first."""

    kind: Literal["pretrain"] = "pretrain"
    shape: ShapeConfig = ShapeConfig()
    """Shape of the model."""
    train: TrainConfig = TrainConfig(objective=ArObjective())
    """How it is trained; the objective must be `ar`."""
    seed: Seed = 0
    """Seed of the weights and of the data order; the arms of a grid share it."""

    def model_post_init(self, context: object) -> None:
        if self.train.objective.kind != "ar":
            raise ValueError("base.train.objective.kind must be `ar`")


Base = Annotated[PretrainedBase | ImportedBase, Field(discriminator="kind")]
