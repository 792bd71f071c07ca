"""Settings of decoding: strategy, extent, sampler. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from abf.base import ConfigModel, Threads
from abf.model.config import AttentionBackend


class _MaskStrategy(ConfigModel):
    @property
    def needs_edits(self) -> bool:
        """Whether it reads the edit heads."""
        return False


class ArStrategy(_MaskStrategy):
    """Token by token on the clean stream with a KV cache."""

    kind: Literal["ar"] = "ar"


Window = Annotated[
    int | None,
    Field(
        ge=1,
        description="Only the first so many masks of the block may be filled at a step (sub-blocks "
        "of Fast-dLLM v2); none lets all.",
    ),
]


class ThresholdStrategy(_MaskStrategy):
    """Commit every mask whose confidence reaches the threshold, else the surest one (Fast-dLLM)."""

    kind: Literal["threshold"] = "threshold"
    threshold: float = Field(default=0.9, ge=0, le=1)
    """Confidence: probability of the chosen token before temperature."""
    window: Window = None


Operation = Literal["fill", "insert", "substitute", "delete"]


class AbfStrategy(ConfigModel):
    """Fill, insert, substitute and delete until the block is whole; lock; complete."""

    kind: Literal["abf"] = "abf"
    operations: tuple[Operation, ...] = ("fill", "insert", "substitute", "delete")
    """What may be done; `fill` is always among them."""
    fill: float = Field(default=0.9, ge=0, le=1)
    """Fill masks whose token has this probability before temperature, else the surest one."""
    window: Window = None
    substitute: float = Field(default=0.5, ge=0, le=1)
    """Exchange a token where P(revise) times the best other token's probability reaches this."""
    delete: float = Field(default=0.5, ge=0, le=1)
    """Take out a slot with this probability that nothing belongs there."""
    insert: float = Field(default=0.5, gt=0)
    """Insert where so many tokens are missing between two tokens."""
    max_insert: int = Field(default=8, ge=1)
    """Most masks inserted between two tokens at once."""
    lock_after: int | None = Field(default=None, ge=1)
    """Steps without change after which a token is locked; none locks at completion only."""
    complete: float = Field(default=0.5, ge=0, le=1)
    """Probability that the block is whole at which it may be closed; 0 does not ask."""

    @property
    def needs_edits(self) -> bool:
        """Whether it reads the edit heads."""
        return set(self.operations) != {"fill"} or self.complete > 0

    def model_post_init(self, context: object) -> None:
        if "fill" not in self.operations or len(set(self.operations)) < len(self.operations):
            raise ValueError(
                f"operations={list(self.operations)} must name `fill`, and each one once"
            )


class PathStrategy(ConfigModel):
    """The process that the bound is about, on a grid of times; for validating, not for speed."""

    kind: Literal["path"] = "path"
    steps: int = Field(default=64, ge=1)
    """Intervals of the grid; the finer, the closer to the process."""
    tau_max: float = Field(default=12.0, gt=0)
    """Time at which the grid ends: a mask is left with probability about tau_max exp(-tau_max)."""
    late: float = Field(default=0.15, ge=0, lt=1)
    """p_D of the corruption that the model was trained with."""
    wrong: float = Field(default=0.1, ge=0, lt=1)
    """p_u of the corruption that the model was trained with."""

    @property
    def needs_edits(self) -> bool:
        """Whether it reads the edit heads."""
        return True


Strategy = Annotated[
    ArStrategy | ThresholdStrategy | AbfStrategy | PathStrategy, Field(discriminator="kind")
]


class FixedExtent(ConfigModel):
    """Every block has the same length."""

    kind: Literal["fixed"] = "fixed"
    length: int = Field(ge=1)
    """Slots a block."""


class LengthHeadExtent(ConfigModel):
    """The length head decides, from the state of the last committed token."""

    kind: Literal["length_head"] = "length_head"
    pick: Literal["sample", "mode"] = "sample"
    """Draw a length, or take the likeliest."""
    late: float | None = Field(default=None, ge=0, lt=1)
    """p_D of the corruption that the model was trained with: its head counts the masks at the start
    of a path, and the block is opened with as many as it has tokens when finished. None takes that
    of the run's training; 0 opens with the masks at the start."""


class EarlierExtent(ConfigModel):
    """The block is opened with the text of an earlier one, prompt's or own, as a draft to edit."""

    kind: Literal["earlier"] = "earlier"
    back: int = Field(default=2, ge=1)
    """How many blocks before; a prompt must have as many."""


Extent = Annotated[FixedExtent | LengthHeadExtent | EarlierExtent, Field(discriminator="kind")]


class SamplerConfig(ConfigModel):
    """How a token is chosen from its distribution."""

    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus mass; 1 keeps everything."""


class DecoderConfig(ConfigModel):
    """One way of generating text with a trained model."""

    strategy: Strategy
    """What to commit or edit at a step."""
    extent: Extent | None = None
    """How long the next block is; none for `ar`."""
    sampler: SamplerConfig = SamplerConfig()
    """Token choice."""
    forbidden: tuple[int | str, ...] = ()
    """Tokens that are never chosen: ids, or texts of one token."""
    keep: tuple[str, ...] = ()
    """Words that stand locked in the first block from its opening."""
    max_slots: int | None = Field(default=None, ge=1)
    """Most slots of a block, at its opening and later; none leaves that to the model."""
    granularity: int | None = Field(default=None, ge=1)
    """Mean block length in tokens that the model is told to write, one of those it was trained with
    (train.objective.stages); none tells it nothing."""
    batch_size: int = Field(default=8, ge=1)
    """Requests decoded side by side."""
    max_steps_per_block: int = Field(default=256, ge=1)
    """Forced end of a block that makes no progress."""
    edits_per_slot: int = Field(default=4, ge=0)
    """How often one slot's token may be substituted."""
    reopen: float | None = Field(default=None, le=0)
    """Nats: a block whose mean AR log-probability is below is opened once more, with masks for the
    tokens below; none leaves it as it is."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is resolved once when the run is planned."""
    threads: Threads = 1
    """CPU threads."""
    attention: AttentionBackend = "tiles"
    """Back end of the cached forward pass's attention, chosen explicitly."""

    def model_post_init(self, context: object) -> None:
        if self.extent is not None and self.extent.kind == "earlier":
            self._check_earlier()
        if self.strategy.kind == "path":
            self._check_path(self.strategy)
        if any(not word for word in self.keep):
            raise ValueError("keep: an empty word")
        if self.keep and self.strategy.kind == "ar":
            raise ValueError("keep: strategy `ar` opens no block that could hold a word")
        if self.granularity is not None and self.strategy.kind == "ar":
            raise ValueError(
                f"granularity={self.granularity}: strategy `ar` opens no block of any length"
            )
        if (self.strategy.kind == "ar") != (self.extent is None):
            raise ValueError(
                "strategy `ar` takes no extent; every other strategy needs one, as in "
                f"`extent: {{kind: length_head}}` (strategy.kind={self.strategy.kind}, "
                f"extent={self.extent})"
            )

    def trained_with(self, late: float) -> DecoderConfig:
        """The same with the p_D of its model's training, where it leaves that open."""
        extent = self.extent
        if extent is None or extent.kind != "length_head" or extent.late is not None:
            return self
        own = 0.0 if self.strategy.kind == "path" else late
        return self.model_copy(update={"extent": extent.model_copy(update={"late": own})})

    def _check_earlier(self) -> None:
        edits = ("insert", "substitute", "delete")
        if self.strategy.kind != "abf" or not set(edits) & set(self.strategy.operations):
            raise ValueError(
                f"extent `earlier` opens a block with text to be edited, and strategy "
                f"`{self.strategy.kind}` as it is set edits none: use strategy `abf` with one of "
                f"{', '.join(edits)} among its operations, or another extent"
            )
        for name in ("keep", "forbidden"):
            if value := getattr(self, name):
                raise ValueError(
                    f"{name}={list(value)}: extent `earlier` opens a block with a text that is as "
                    "it is; use another extent"
                )

    def _check_path(self, strategy: PathStrategy) -> None:
        sampler = self.sampler
        if sampler.temperature != 1 or sampler.top_p != 1:
            raise ValueError(
                "strategy `path` samples the model's own process: it needs sampler.temperature 1 "
                f"and top_p 1 (temperature={sampler.temperature}, top_p={sampler.top_p})"
            )
        for name in ("reopen", "forbidden", "keep", "max_slots"):
            if (value := getattr(self, name)) not in (None, ()):
                raise ValueError(
                    f"{name}={value} would be another law than strategy `path` samples"
                )
        extent = self.extent
        if extent is not None and extent.kind == "length_head" and extent.pick != "sample":
            raise ValueError(
                f"extent.pick={extent.pick} would be another law than strategy `path` samples: the "
                "number of masks at the start is drawn; use pick: sample"
            )
        if extent is not None and extent.kind == "length_head" and extent.late:
            raise ValueError(
                f"extent.late={extent.late}: strategy `path` starts with the masks of the "
                "length head and inserts the late ones; leave it at 0"
            )
        if self.max_steps_per_block < strategy.steps + 2:
            raise ValueError(
                f"max_steps_per_block={self.max_steps_per_block} cuts the grid of strategy `path` "
                f"short: it needs steps + 2 = {strategy.steps + 2}"
            )
