"""Cost of each arm and stage from ledger rows, each figure with the job ids behind it.

Hours are reserved cores (or nodes) times wall-clock, failed attempts included. Pure functions of
dictionaries.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
        return _sum(self.rows, "core_hours")

    @property
    def node_hours(self) -> float | None:
        """Sum of node-hours; None if no attempt has any."""
        return _sum(self.rows, "node_hours")

    @property
    def attempts(self) -> int:
        """Attempts, whatever became of them."""
        return len(self.rows)

    @property
    def failed(self) -> int:
        """Attempts that ended without completing."""
        return sum(row["state"] not in ("COMPLETED", "RUNNING") for row in self.rows)

    @property
    def energy_j(self) -> float | None:
        """Joules of the attempts that were measured."""
        return _sum(self.rows, "energy_j")

    @property
    def energy_text(self) -> str:
        """Joules and their meter, or that they were not measured."""
        measured = [row for row in self.rows if row["energy_j"] is not None]
        if self.energy_j is None:
            return "not measured"
        sources = ", ".join(dict.fromkeys(row["energy_source"] for row in measured))
        share = "" if len(measured) == len(self.rows) else f", {len(measured)} of {len(self.rows)}"
        return f"{self.energy_j:,.0f} J ({sources}{share})"


def costs(ledger: Sequence[Mapping[str, Any]], owners: Mapping[tuple[str, str], str]) -> list[Cost]:
    """Ledger rows by arm and stage; arms in order of `owners`, then what all of them share.

    Args:
        ledger: rows of the LEDGER schema.
        owners: (rule, run key) -> arm; a directory that several arms use has no owner.
    """
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for row in ledger:
        arm = owners.get((row["rule"], row["run"]), SHARED)
        groups.setdefault((arm, row["rule"]), []).append(row)
    order = [*dict.fromkeys(owners.values()), SHARED]
    names = sorted(groups, key=lambda name: order.index(name[0]))
    return [Cost(arm, stage, groups[arm, stage]) for arm, stage in names]


def total(found: Sequence[Cost], *arms: str) -> Cost:
    """Everything of some arms, or of all."""
    rows = [row for cost in found if not arms or cost.arm in arms for row in cost.rows]
    return Cost(" and ".join(arms) or "total", "all", rows)


def _sum(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) if values else None
