"""Settings of the evaluation protocols. Imports no torch."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from abf.base import ConfigModel, Threads


class LikelihoodTask(ConfigModel):
    """Held-out bits per byte: AR view, block bound with and without boundary bits."""

    kind: Literal["likelihood"] = "likelihood"
    max_rows: int | None = Field(default=None, ge=1)
    """Score this many held-out rows, spread evenly over the split; none scores all."""
    samples: int = Field(default=4, ge=1)
    """Noise draws a block for the bound's Monte-Carlo estimate."""
    batch_rows: int = Field(default=8, ge=1)
    """Rows a forward pass."""


class ContinuationTask(ConfigModel):
    """Continue held-out documents; text is judged by the base AR model and by its diversity."""

    kind: Literal["continuation"] = "continuation"
    prompts: int = Field(default=16, ge=1)
    """Held-out documents used, spread evenly over those that are long enough."""
    prompt_tokens: int = Field(default=32, ge=1)
    """Tokens of the document shown."""
    new_tokens: int = Field(default=64, ge=1)
    """Tokens to generate."""

    @property
    def prompt_lines(self) -> None:
        """Prompts are cut by tokens."""


class ListsTask(ConfigModel):
    """Answer held-out list-editing documents; what is right is known word by word."""

    kind: Literal["lists"] = "lists"
    prompts: int = Field(default=200, ge=1)
    """Held-out documents used, spread evenly over the split."""
    new_tokens: int = Field(default=32, ge=1)
    """Tokens to generate at most; an answer ends with its document."""

    @property
    def prompt_tokens(self) -> None:
        """Prompts are cut by lines."""

    @property
    def prompt_lines(self) -> int:
        """The list, and what is to be done to it."""
        return 2


class ScoringConfig(ConfigModel):
    """How the scoring models are run."""

    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    """fp32 judges models trained in different precisions alike."""
    threads: Threads = 1
    """CPU threads."""


Task = Annotated[LikelihoodTask | ContinuationTask | ListsTask, Field(discriminator="kind")]
GENERATIVE_KINDS = ("continuation", "lists")
"""Task kinds that need a decoder."""
