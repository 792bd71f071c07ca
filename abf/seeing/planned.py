"""What the studies of a results folder ask for: from a study file, or from the plans on disk.

Nothing is written. A place is `{stage}/{key}`, a stage directory relative to the results folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from abf.artifacts import PlanDocument, read_plans
from abf.files import read_if_json
from abf.grid import load_study
from abf.plan import Plan
from abf.stages import CONFIG, ENDS, STAGES

Document = dict[str, Any]
"""Content of a `config.json`: stage, key, config, inputs, resolved."""


def slug(key: str) -> str:
    """A key without its hashes: `ar-s0-1a2b3c4d/go.x-5e6f7a8b` -> `ar-s0/go.x`."""
    return re.sub(r"-[0-9a-f]{8}(?=/|$)", "", key)


def read_document(directory: Path) -> Document | None:
    """`config.json` of a stage directory; none where there is none that can be read."""
    return read_if_json(directory / CONFIG)


def inputs_of(document: Document) -> dict[str, list[str]]:
    """Input places by name."""
    inputs: Mapping[str, str | list[str]] = document["inputs"]
    return {name: [up] if isinstance(up, str) else up for name, up in inputs.items()}


@dataclass(frozen=True)
class Planned:
    """Plans and the `config.json` that each planned directory should have."""

    results: Path
    plans: tuple[PlanDocument, ...]
    study: Path | None
    """The study file this comes from; None: the plans on disk."""
    _documents: dict[str, Document] = field(default_factory=dict)

    @cached_property
    def places(self) -> tuple[str, ...]:
        """All planned directories, in pipeline order."""
        found = [place for plan in self.plans for place in [*plan["stages"], *self._ends(plan)]]
        order = list(STAGES)
        return tuple(sorted(dict.fromkeys(found), key=lambda p: order.index(p.partition("/")[0])))

    @property
    def directories(self) -> list[Path]:
        """Where the planned places are."""
        return [self.results / place for place in self.places]

    @cached_property
    def _cells(self) -> dict[str, list[str]]:
        """Cells by the trainings and decodings that they use."""
        found: dict[str, list[str]] = {}
        for plan in self.plans:
            study = f"{plan['study']}: " if len(self.plans) > 1 else ""
            for cell in plan["cells"]:
                for place in (cell["train"], *cell["decodes"].values()):
                    found.setdefault(place, []).append(study + cell["name"])
        return found

    def name(self, place: str) -> str:
        """The place, and its cell where the key does not say it: arms may share all but a hash."""
        cells = self._cells.get(place)
        if cells is None or slug(place).split("/")[1] in cells:
            return place
        return f"{place} ({cells[0]}" + (f" and {len(cells) - 1} more)" if cells[1:] else ")")

    @property
    def targets(self) -> frozenset[str]:
        """What Snakemake is asked for."""
        return frozenset(
            f"{stage}/{plan['study']}" for plan in self.plans for stage in ("report", "mlflow")
        )

    def document(self, place: str) -> Document | None:
        """The `config.json` a directory should have; the one it has where nothing plans it."""
        if place not in self._documents and (known := read_document(self.results / place)):
            self._documents[place] = known
        return self._documents.get(place)

    def _ends(self, plan: PlanDocument) -> list[str]:
        return [f"{stage}/{plan['study']}" for stage in ENDS]


def read_planned(results: Path, study: Path | None) -> Planned:
    """What is planned below `results`.

    Args:
        study: grid or run YAML to plan in memory; None: every plan that was written.

    Raises:
        ConfigError: the study is faulty.
    """
    if study is None:
        return Planned(results, tuple(read_plans(results)), None)
    plan = Plan(load_study(study), results)
    documents = {i.place: plan.document(i) for i in plan.instances.values()}
    return Planned(results, (plan.as_document(),), study, documents)
