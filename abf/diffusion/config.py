"""Settings of corruption and loss. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from abf.base import ConfigModel


class CountLaw(ConfigModel):
    """K uniform on 1..S: never an empty block, a block of one token always masked."""

    kind: Literal["count"] = "count"


class Clip(ConfigModel):
    """Mask rates for blocks up to a length."""

    up_to: int = Field(ge=1)
    """Longest block they are for, in tokens."""
    low: float = Field(ge=0, lt=1)
    high: float = Field(gt=0, le=1)

    def model_post_init(self, context: object) -> None:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")


class UniformRate(ConfigModel):
    """Each token masked with a rate that is uniform on [low, high]."""

    kind: Literal["uniform"] = "uniform"
    low: float = Field(default=0.0, ge=0, lt=1)
    high: float = Field(default=1.0, gt=0, le=1)
    by_length: tuple[Clip, ...] = ()
    """Other rates for shorter blocks: the first entry a block fits in counts."""

    def model_post_init(self, context: object) -> None:
        if self.low >= self.high:
            raise ValueError(f"low ({self.low}) must be below high ({self.high})")
        lengths = [clip.up_to for clip in self.by_length]
        if lengths != sorted(set(lengths)):
            raise ValueError(f"by_length must grow in up_to, not {lengths}")


class BetaRate(ConfigModel):
    """Each token masked with a rate that is Beta(mean * c, (1 - mean) * c)."""

    kind: Literal["beta"] = "beta"
    mean: float = Field(default=0.5, gt=0, lt=1)
    concentration: float = Field(default=2.0, gt=0)
    """c; the larger, the closer to the mean."""


MaskLaw = Annotated[CountLaw | UniformRate | BetaRate, Field(discriminator="kind")]


class MaskedCorruption(ConfigModel):
    """Tokens are masked, each in its place. The defaults are the exactly unbiased estimator of the
    bound; other laws and weights are those of the systems in config/recipes."""

    kind: Literal["masked"] = "masked"
    law: MaskLaw = CountLaw()
    """How many tokens of a block."""
    weight: Literal["exact", "rate", "realised", "one"] = "exact"
    """Of a masked token's loss: what makes the sum an unbiased bound whatever the law; 1/rate;
    tokens/masked tokens of the block; 1."""
    shared: Literal["block", "document"] = "block"
    """Who shares a draw: each block has its own, or all blocks of a document have one."""
    pair: bool = False
    """Two views of every row, with complementary masks."""
    stratify: bool = True
    """Spread draws over the blocks of a batch (lower variance, same expectation)."""

    def model_post_init(self, context: object) -> None:
        if self.pair and self.weight not in ("exact", "one"):
            raise ValueError(
                f"weight: {self.weight} says nothing of the complementary view of a pair (its rate "
                "was not drawn): use exact or one"
            )

    @property
    def bound(self) -> bool:
        """Whether the weighted loss is an unbiased draw of the bound, not another objective."""
        law = self.law
        whole = law.kind == "uniform" and (law.low, law.high, law.by_length) == (0.0, 1.0, ())
        counted = law.kind == "count" and self.weight in ("rate", "realised")
        return self.weight == "exact" or counted or (whole and self.weight == "rate")

    def reported(self) -> MaskedCorruption:
        """What the bound is reported under: the exact estimator, whatever was trained on."""
        return MaskedCorruption()


Share = Annotated[float, Field(ge=0, le=1)]


class DraftsConfig(ConfigModel):
    """Blocks with mistakes such as a sampler makes; they teach edits and completion, no bound."""

    share: float = Field(default=0.4, gt=0, lt=1)
    """Share of blocks that are drafts; the others are on their paths and weigh that much more."""
    earlier: Share = 0.0
    """Share of drafts that begin as the block `back` blocks before, where there is one, some of the
    edits that it needs done already. The shares below are of the other drafts."""
    back: int = Field(default=2, ge=1)
    """How many blocks before."""
    right: Share = 0.25
    """Share that needs nothing."""
    near: Share = 0.2
    """Share that is one edit away."""
    cut: Share = 0.15
    """Share that stops early or lacks a span."""
    overrun: Share = 0.1
    """Share that runs on into the next block."""
    repeat: Share = 0.1
    """Share that says an n-gram twice; the rest has random mistakes."""
    shifted: Share = 0.0
    """Share that starts at a wrong cut: says the end of the text before again, or lacks its own
    beginning."""
    rate: Share = 0.4
    """Of random mistakes: most tokens dropped, replaced, added, as a share of the block."""
    masked: Share = 0.5
    """Share of drafts in which tokens are masked."""
    opened: float = Field(default=0.25, ge=0, lt=1)
    """Share of those in which all are; in the others a share drawn uniformly."""
    own: Share = 0.0
    """Share of drafts that the model writes itself, from masks or from the earlier block on."""
    own_steps: int = Field(default=4, ge=1)
    """Most steps it writes for; 1 to this many are drawn."""
    fixed_length: bool = False
    """Cut drafts, or pad them with masks, to the finished length (LLaDA 2.2's fixed block)."""

    def model_post_init(self, context: object) -> None:
        kinds = self.right + self.near + self.cut + self.overrun + self.repeat + self.shifted
        if kinds > 1 + 1e-9:
            raise ValueError(
                f"right + near + cut + overrun + repeat + shifted = {kinds:g}, but shares add up "
                "to at most 1"
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

    @property
    def bound(self) -> bool:
        """Whether the weighted loss is an unbiased draw of the bound."""
        return True

    def reported(self) -> PathCorruption:
        """What the bound is reported under: drafts have no part in it."""
        return self.model_copy(update={"drafts": None})


Corruption = Annotated[MaskedCorruption | PathCorruption, Field(discriminator="kind")]
"""Corruptions by `kind`."""


class HistoryConfig(ConfigModel):
    """Block dropout: blocks that see nothing of what lies before them but its first tokens."""

    dropout: float = Field(gt=0, le=1)
    """Share of blocks, drawn anew in every epoch."""
    sinks: int = Field(default=1, ge=0)
    """First tokens of a document, the document token counted, that they go on seeing."""


class GranularityConfig(ConfigModel):
    """Blocks of several mean lengths: each document draws one, its blocks are joined at random to
    be about so long, and the model is told which it is."""

    lengths: tuple[Annotated[int, Field(ge=1)], ...] = Field(min_length=1)
    """Mean lengths in tokens; blocks that are longer than that stay as they are."""
    told: float = Field(default=0.9, gt=0, le=1)
    """Share of documents whose granularity the model is told; the others keep it able to do
    without, which is how the bound is reported."""

    def model_post_init(self, context: object) -> None:
        if list(self.lengths) != sorted(set(self.lengths)):
            raise ValueError(f"lengths must grow, not {list(self.lengths)}")


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
    distil_weight: float = Field(default=0.0, ge=0)
    """Weight of agreeing with a teacher on masked tokens (see the objective's `distil_from`)."""
    distil_top: int = Field(default=16, ge=1)
    """Tokens of the teacher's that are compared, the likeliest ones."""

    def model_post_init(self, context: object) -> None:
        if self.clean_stream == "block_causal" and self.ar_weight > 0:
            raise ValueError(
                "ar_weight must be 0 with clean_stream: block_causal (the clean stream sees "
                "its own targets there)"
            )
