"""Settings of the segmenters. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from abf.base import ConfigModel, Seed


class SentenceSegmenter(ConfigModel):
    """Sentences of prose (razdel) and lines of code, merged until they are long enough."""

    kind: Literal["sentence"] = "sentence"
    min_tokens: int = Field(default=4, ge=1)
    """A segment shorter than this joins the next one (the last of a paragraph, the previous)."""


class LineSegmenter(ConfigModel):
    """Lines, however short; blank ones go with the line before."""

    kind: Literal["line"] = "line"


Reference = Annotated[LineSegmenter | SentenceSegmenter, Field(discriminator="kind")]
"""Segmenters that a control arm can be matched to."""


class FixedSegmenter(ConfigModel):
    """Equal lengths: a number, or the one whose mean comes nearest a named other segmenter's."""

    kind: Literal["fixed"] = "fixed"
    length: int | None = Field(default=None, ge=1)
    """Tokens a segment; none takes the mean of `like`."""
    like: Reference | None = None
    """Segmenter whose mean length is matched when `length` is none."""

    def model_post_init(self, context: object) -> None:
        if (self.length is None) == (self.like is None):
            raise ValueError("give exactly one of `length` and `like`")


class RandomSegmenter(ConfigModel):
    """The control: the reference's lengths, exchanged between equally long documents, shuffled."""

    kind: Literal["random"] = "random"
    like: Reference
    """Segmenter whose lengths are taken."""
    seed: Seed = 0
    """Seed of exchange and shuffle; a document's length and id enter too."""


Segmenter = Annotated[
    FixedSegmenter | LineSegmenter | RandomSegmenter | SentenceSegmenter,
    Field(discriminator="kind"),
]
