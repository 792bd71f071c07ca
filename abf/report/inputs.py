"""What the report is made of: cells of a grid, the ledger, sources, and facts worth printing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from abf.report.config import ReportConfig


@dataclass(frozen=True)
class SourceNote:
    """A data source, its licence and whom to credit."""

    name: str
    licence: str
    attribution: str
    documents: int | None = None
    """Documents kept of it; None if nobody counted."""


@dataclass(frozen=True)
class ReportCell:
    """One cell: an arm with a seed. Paths are stage directories."""

    arm: str
    seed: int
    run: str
    train: Path
    """Holds metrics.parquet."""
    score: Path
    """Holds scores.parquet and documents.parquet."""
    pack: Path
    """Holds packed/train.arrow and packed/heldout.pieces.parquet."""
    base: Path
    """Stage directory of the base model; holds journal.jsonl if it was trained here."""
    decodes: Mapping[str, Path] = field(default_factory=dict)
    """Decoder name -> stage directory with samples.parquet and trace.arrows."""
    bound: bool = True
    """Whether its training loss of blocks is the bound, not another objective."""


@dataclass(frozen=True)
class MissingCell:
    """A cell that is not finished: it costs, and has no figures yet."""

    name: str
    reason: str
    cell: ReportCell


@dataclass(frozen=True)
class ReportPlan:
    """Everything the page shows."""

    study: str
    created: str
    """Date and time as text, given by the caller: the same inputs give the same page."""
    git_sha: str
    cells: Sequence[ReportCell]
    """In the order in which the arms are to appear; all of them are finished."""
    ledger: Path
    """Stage directory of the ledger."""
    tokenizer: Path
    """Folder with tokenizer.json and meta.json."""
    sources: Sequence[SourceNote]
    tokens: Mapping[str, int]
    """Text tokens of each split."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """More lines for the head of the page, for example the number of parameters."""
    config: ReportConfig = field(default_factory=ReportConfig)
    missing: Sequence[MissingCell] = ()
    """Cells of the study that are not finished."""
