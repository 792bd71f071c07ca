"""Settings of decoding: strategy, extent, sampler. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from abf.base import ConfigModel, Threads
from abf.model.config import AttentionBackend


class ArStrategy(ConfigModel):
    """Token by token on the clean stream with a KV cache."""

    kind: Literal["ar"] = "ar"


class ThresholdStrategy(ConfigModel):
    """Commit every mask whose confidence reaches the threshold, else the surest one (Fast-dLLM)."""

    kind: Literal["threshold"] = "threshold"
    threshold: float = Field(default=0.9, ge=0, le=1)
    """Confidence: probability of the chosen token before temperature."""


Strategy = Annotated[ArStrategy | ThresholdStrategy, Field(discriminator="kind")]


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


Extent = Annotated[FixedExtent | LengthHeadExtent, Field(discriminator="kind")]


class SamplerConfig(ConfigModel):
    """How a token is chosen from its distribution."""

    temperature: float = Field(default=0.0, ge=0)
    """0 takes the likeliest token."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """Nucleus mass; 1 keeps everything."""


class DecoderConfig(ConfigModel):
    """One way of generating text with a trained model."""

    strategy: Strategy
    """What to commit at a step."""
    extent: Extent | None = None
    """How long the next block is; none for `ar`."""
    sampler: SamplerConfig = SamplerConfig()
    """Token choice."""
    batch_size: int = Field(default=8, ge=1)
    """Requests decoded side by side."""
    max_steps_per_block: int = Field(default=256, ge=1)
    """Forced end of a block that makes no progress."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """`auto` is resolved once when the run is planned."""
    threads: Threads = 1
    """CPU threads."""
    attention: AttentionBackend = "reference"
    """Attention back end of the cached forward pass."""

    def model_post_init(self, context: object) -> None:
        if (self.strategy.kind == "ar") != (self.extent is None):
            raise ValueError(
                "strategy `ar` takes no extent; every other strategy needs one "
                f"(strategy.kind={self.strategy.kind}, extent={self.extent})"
            )
