"""Settings of the report. Imports no torch."""

from __future__ import annotations

from pydantic import Field

from abf.base import ConfigModel


class ReportConfig(ConfigModel):
    """What the report page shows."""

    title: str = "Adaptive Block Forcing"
    """Heading of the page."""
    generations: int = Field(default=3, ge=0)
    """Generations an arm that are shown block by block."""
    bootstrap: int = Field(default=2000, ge=100)
    """Resamples behind every interval."""
    confidence: float = Field(default=0.95, gt=0, lt=1)
    """Coverage of every interval."""
