"""Settings of the evaluation protocols. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from abf.base import ConfigModel


class LikelihoodTask(ConfigModel):
    """Held-out bits per byte: AR view, block bound with and without boundary bits."""

    kind: Literal["likelihood"] = "likelihood"
    max_rows: int | None = Field(default=None, ge=1)
    """Score the first this many held-out rows; none scores all."""
    samples: int = Field(default=4, ge=1)
    """Noise draws a block for the bound's Monte-Carlo estimate."""
    batch_rows: int = Field(default=8, ge=1)
    """Rows a forward pass."""


class ContinuationTask(ConfigModel):
    """Continue held-out documents; text is judged by the base AR model and by its diversity."""

    kind: Literal["continuation"] = "continuation"
    prompts: int = Field(default=16, ge=1)
    """Held-out documents used, in split order."""
    prompt_tokens: int = Field(default=32, ge=1)
    """Tokens of the document shown."""
    new_tokens: int = Field(default=64, ge=1)
    """Tokens to generate."""


Task = Annotated[LikelihoodTask | ContinuationTask, Field(discriminator="kind")]
GENERATIVE_KINDS = ("continuation",)
"""Task kinds that need a decoder."""
