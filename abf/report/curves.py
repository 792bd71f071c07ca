"""Training curves of the cells, and what their base models had reached; tokens are clean tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from abf.artifacts import METRICS, read_table
from abf.report.inputs import ReportCell
from abf.track.journal import metrics_table

Curve = tuple[NDArray[np.float64], NDArray[np.float64]]
"""Clean tokens, value."""
Panels = dict[str, dict[str, dict[int, Curve]]]
"""Journal metric -> arm -> seed -> curve."""

TITLES = {
    "nelbo": "Block loss (noisy stream)",
    "ar": "AR loss (clean stream)",
    "length": "Block length",
}
"""Journal metrics that get a panel, if any arm has them."""


@dataclass(frozen=True)
class Training:
    """How a model was trained, as far as its journal says."""

    tokens: int
    peak_rate: float
    """Highest learning rate on record."""
    last_rate: float
    loss: float
    """AR loss of training batches in nats per token, mean over the last tenth of the tokens."""


def training_panels(cells: Sequence[ReportCell]) -> Panels:
    """Curves of every cell, panels in the order of TITLES.

    Raises:
        ArtifactError: the metrics of a cell are missing or damaged; names the file.
    """
    panels: Panels = {name: {} for name in TITLES}
    for cell in cells:
        table = read_table(cell.train / "metrics.parquet", METRICS)
        for name, by_arm in panels.items():
            tokens, values = _curve(table, name)
            if len(tokens):
                by_arm.setdefault(cell.arm, {})[cell.seed] = (tokens, values)
    return {name: by_arm for name, by_arm in panels.items() if by_arm}


def training_of_cells(cells: Sequence[ReportCell]) -> list[Training]:
    """Training of the cells that have an AR loss."""
    return _trainings(read_table(cell.train / "metrics.parquet", METRICS) for cell in cells)


def training_of_bases(bases: Iterable[Path]) -> list[Training]:
    """Training of the base models made here; an imported one has no journal."""
    journals = [base / "journal.jsonl" for base in bases]
    return _trainings(metrics_table(journal) for journal in journals if journal.exists())


def _trainings(tables: Iterable[pa.Table]) -> list[Training]:
    found = []
    for table in tables:
        (tokens, loss), (_, rate) = _curve(table, "ar"), _curve(table, "lr")
        if len(tokens) and len(rate):
            late = loss[tokens > 0.9 * tokens[-1]]
            found.append(
                Training(int(tokens[-1]), float(rate.max()), float(rate[-1]), float(late.mean()))
            )
    return found


def _curve(table: pa.Table, name: str) -> Curve:
    mine = np.asarray(table["name"].to_pylist(), dtype=object) == name
    tokens, values = (table[column].to_numpy()[mine] for column in ("tokens", "value"))
    order = np.argsort(tokens, kind="stable")
    return tokens[order].astype(float), values[order]
