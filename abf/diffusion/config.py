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


class PathCorruption(ConfigModel):
    """A block on its way from masks to text: tokens come late, some come wrong and are mended."""

    kind: Literal["path"] = "path"
    late: float = Field(default=0.15, ge=0, lt=1)
    """p_D, share of tokens whose MASK is inserted on the way; they teach insertion."""
    wrong: float = Field(default=0.1, ge=0, lt=1)
    """p_u, share of fills that draw any token; they teach substitution."""
    stratify: bool = True
    """Spread times over the blocks of a batch (lower variance, same expectation)."""


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

    def model_post_init(self, context: object) -> None:
        if self.clean_stream == "block_causal" and self.ar_weight > 0:
            raise ValueError(
                "ar_weight must be 0 with clean_stream: block_causal (the clean stream sees "
                "its own targets there)"
            )
