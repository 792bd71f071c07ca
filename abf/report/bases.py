"""The base models as arms of their own: what every other arm started from, on the same text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from abf.report.inputs import ReportCell
from abf.report.metrics import AR, BASE
from abf.report.tables import CellScores

NAME = "base model"
"""No arm can be called so: names of arms hold no space."""


def base_names(cells: Sequence[ReportCell]) -> dict[Path, str]:
    """Stage directory of each base model -> its name on the page."""
    found = dict.fromkeys(cell.base for cell in cells)
    return {path: NAME if len(found) == 1 else f"{NAME} {path.name}" for path in found}


def base_scores(
    cells: Sequence[ReportCell], scores: Sequence[CellScores], names: Mapping[Path, str]
) -> list[CellScores]:
    """Scores of the base models, under every seed: arms are paired with them by seed.

    Every cell scores its base beside itself; an AR model is its own AR view.
    """
    found = {}
    for cell, own in zip(cells, scores, strict=True):
        name = names[cell.base]
        of_base = CellScores(name, cell.seed, _as_ar(own.scores), _as_ar(own.documents))
        found.setdefault((name, cell.seed), of_base)
    return list(found.values())


def _as_ar(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    return [{**r, "metric": AR} for r in rows if r["metric"] == BASE and not r["decoder"]]
