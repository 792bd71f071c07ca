"""Settings of the segmenters. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from abf.base import ConfigModel


class SentenceSegmenter(ConfigModel):
    """Sentences of prose (razdel) and lines of code, merged until they are long enough."""

    kind: Literal["sentence"] = "sentence"
    min_tokens: int = Field(default=4, ge=1)
    """A segment shorter than this joins the next one (the last joins the previous)."""


Reference = Annotated[SentenceSegmenter, Field()]
"""Segmenters that a control arm can be matched to (a union once there are more)."""


class FixedSegmenter(ConfigModel):
    """Equal lengths: a number, or the rounded mean length of a named other segmenter."""

    kind: Literal["fixed"] = "fixed"
    length: int | None = Field(default=None, ge=1)
    """Tokens a segment; none takes the mean of `like`."""
    like: Reference | None = None
    """Segmenter whose mean length is taken when `length` is none."""

    def model_post_init(self, context: object) -> None:
        if (self.length is None) == (self.like is None):
            raise ValueError("give exactly one of `length` and `like`")


class RandomSegmenter(ConfigModel):
    """The control: every document keeps the reference's lengths, in a random order."""

    kind: Literal["random"] = "random"
    like: Reference
    """Segmenter whose lengths are shuffled, document by document."""
    seed: int = 0
    """Seed of the shuffle; the document's id enters too."""


Segmenter = Annotated[
    FixedSegmenter | RandomSegmenter | SentenceSegmenter, Field(discriminator="kind")
]
