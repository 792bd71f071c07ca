"""Cost of each arm and stage from ledger rows, each figure with the job ids behind it.

Hours are reserved cores (or nodes) times wall-clock, failed attempts included. Pure functions of
dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from abf.report.inputs import ReportCell
from abf.track.mlflow_costs import column_sum, has_failed

SHARED = "shared"
"""Stages that belong to no single arm: data, tokenizer, segmentation, base model."""


@dataclass(frozen=True)
class Cost:
    """What one stage cost for one arm."""

    arm: str
    stage: str
    rows: Sequence[Mapping[str, Any]]
    """Ledger rows (schema LEDGER)."""

    @property
    def core_hours(self) -> float | None:
        """Sum of core-hours; None if no attempt has any (a cluster counts node-hours)."""
        return column_sum(self.rows, "core_hours")

    @property
    def node_hours(self) -> float | None:
        """Sum of node-hours; None if no attempt has any."""
        return column_sum(self.rows, "node_hours")

    @property
    def attempts(self) -> int:
        """Attempts, whatever became of them."""
        return len(self.rows)

    @property
    def failed(self) -> int:
        """Attempts that ended without completing."""
        return sum(map(has_failed, self.rows))

    @property
    def energy_j(self) -> float | None:
        """Joules of the attempts that were measured."""
        return column_sum(self.rows, "energy_j")

    @property
    def energy_text(self) -> str:
        """Joules and their meter, or that they were not measured."""
        measured = [row for row in self.rows if row["energy_j"] is not None]
        if self.energy_j is None:
            return "not measured"
        sources = ", ".join(dict.fromkeys(row["energy_source"] for row in measured))
        share = "" if len(measured) == len(self.rows) else f", {len(measured)} of {len(self.rows)}"
        return f"{self.energy_j:,.0f} J ({sources}{share})"


def costs(ledger: Sequence[Mapping[str, Any]], arms: Mapping[tuple[str, str], str]) -> list[Cost]:
    """Ledger rows by arm and stage; in order of `arms`, then what all of them share.

    Args:
        ledger: rows of the LEDGER schema.
        arms: (rule, run key) -> arm; a directory that several arms use has no owner.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in ledger:
        arm = arms.get((row["rule"], row["run"]), SHARED)
        groups.setdefault((arm, row["rule"]), []).append(row)
    order = [*dict.fromkeys(arms.values()), SHARED]
    names = sorted(groups, key=lambda name: order.index(name[0]))
    return [Cost(arm, stage, groups[arm, stage]) for arm, stage in names]


def owners(cells: Sequence[ReportCell], bases: Mapping[Path, str]) -> dict[tuple[str, str], str]:
    """(rule, run key) -> arm or base model, for directories that one of them alone uses."""
    users = {("base", _key("base", path)): {name} for path, name in bases.items()}
    for cell in cells:
        own = [("pack", cell.pack), ("train", cell.train), ("score", cell.score)]
        own += [("decode", directory) for directory in cell.decodes.values()]
        for stage, directory in own:
            users.setdefault((stage, _key(stage, directory)), set()).add(cell.arm)
    order = [*bases.values(), *dict.fromkeys(cell.arm for cell in cells)]
    single = {name: next(iter(arms)) for name, arms in users.items() if len(arms) == 1}
    return dict(sorted(single.items(), key=lambda item: order.index(item[1])))


def _key(stage: str, directory: Path) -> str:
    """`{key}` of `results/{stage}/{key}`, as the ledger has it; a key may have several parts."""
    parts = directory.parts
    at = len(parts) - parts[::-1].index(stage) if stage in parts else len(parts) - 1
    return "/".join(parts[at:])


def total(found: Sequence[Cost], *arms: str) -> Cost:
    """Everything of some arms, or of all."""
    rows = [row for cost in found if not arms or cost.arm in arms for row in cost.rows]
    return Cost(" and ".join(arms) or "total", "all", rows)


def side_by_side(ledger: Sequence[Mapping[str, Any]], rule: str) -> tuple[int, int]:
    """Attempts of a stage that ran while another job of the ledger did, and all its attempts.

    Only on a machine of one's own: a cluster records when a job was submitted, not its start, and
    reserves what it runs on.
    """
    here = [row for row in ledger if row["node_hours"] is None]
    start = [datetime.fromisoformat(row["submit_time"]).timestamp() for row in here]
    end = [at + row["elapsed_s"] for at, row in zip(start, here, strict=True)]
    mine = [i for i, row in enumerate(here) if row["rule"] == rule]
    crowded = [
        any(j != i and start[j] < end[i] and start[i] < end[j] for j in range(len(here)))
        for i in mine
    ]
    return sum(crowded), len(mine)
