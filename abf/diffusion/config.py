"""Settings of corruption and loss. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from abf.base import ConfigModel


class MaskedCorruption(ConfigModel):
    """K masks in a block, K uniform on 1..S: the exactly unbiased K-subset estimator."""

    kind: Literal["masked"] = "masked"
    stratify: bool = True
    """Spread K over the blocks of a batch (lower variance, same expectation)."""


Share = Annotated[float, Field(ge=0, le=1)]


class DraftsConfig(ConfigModel):
    """Blocks with mistakes such as a sampler makes; they teach edits and completion, no bound."""

    share: float = Field(default=0.4, gt=0, lt=1)
    """Share of blocks that are drafts; the others are on their paths and weigh that much more."""
    right: Share = 0.25
    """Share of drafts that need nothing."""
    near: Share = 0.2
    """Share that is one edit away."""
    cut: Share = 0.15
    """Share that stops early or lacks a span."""
    overrun: Share = 0.1
    """Share that runs on into the next block."""
    repeat: Share = 0.1
    """Share that says an n-gram twice; the rest has random mistakes."""
    rate: Share = 0.4
    """Of random mistakes: most tokens dropped, replaced, added, as a share of the block."""
    masked: Share = 0.5
    """Share of drafts in which tokens are masked."""
    opened: float = Field(default=0.25, ge=0, lt=1)
    """Share of those in which all are; in the others a share drawn uniformly."""
    own: Share = 0.0
    """Share of drafts that the model writes itself, starting from masks."""
    own_steps: int = Field(default=4, ge=1)
    """Most steps it writes for; 1 to this many are drawn."""
    fixed_length: bool = False
    """Cut drafts, or pad them with masks, to the finished length (LLaDA 2.2's fixed block)."""

    def model_post_init(self, context: object) -> None:
        kinds = self.right + self.near + self.cut + self.overrun + self.repeat
        if kinds > 1 + 1e-9:
            raise ValueError(
                f"right + near + cut + overrun + repeat = {kinds:g}, but shares add up to at most 1"
            )


class PathCorruption(ConfigModel):
    """A block on its way from masks to text: tokens come late, some come wrong and are mended."""

    kind: Literal["path"] = "path"
    late: float = Field(default=0.15, ge=0, lt=1)
    """p_D, share of tokens whose MASK is inserted on the way; they teach insertion."""
    wrong: float = Field(default=0.1, ge=0, lt=1)
    """p_u, share of fills that draw any token; they teach substitution."""
    stratify: bool = True
    """Spread times over the blocks of a batch (lower variance, same expectation)."""
    drafts: DraftsConfig | None = None
    """Blocks to be edited instead of points of a path; none: the bound alone is trained."""


Corruption = Annotated[MaskedCorruption | PathCorruption, Field(discriminator="kind")]
"""Corruptions by `kind`."""


class LossConfig(ConfigModel):
    """Weights of the loss terms; each term has its own global count."""

    shift: bool = True
    """Keep next-token alignment: a token is read from the state before it."""
    clean_stream: Literal["context_causal", "block_causal"] = "context_causal"
    """What a clean token sees: every clean token before it, or its whole block as well."""
    ar_weight: float = Field(default=0.5, ge=0)
    """Weight of next-token cross-entropy on the clean stream (0 with `block_causal`)."""
    length_weight: float = Field(default=0.1, ge=0)
    """Weight of the block-length head's cross-entropy."""
    edit_weight: float = Field(default=0.0, ge=0)
    """Weight of what drafts teach of edits: gates, missing tokens, tokens of masks and mistakes."""
    complete_weight: float = Field(default=0.0, ge=0)
    """Weight of the cross-entropy of "this block is whole and right"."""

    def model_post_init(self, context: object) -> None:
        if self.clean_stream == "block_causal" and self.ar_weight > 0:
            raise ValueError(
                "ar_weight must be 0 with clean_stream: block_causal (the clean stream sees "
                "its own targets there)"
            )
