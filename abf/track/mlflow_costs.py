"""What runs cost, for MLflow: ledger rows charged to the cell that owns them or to the grid.

Hours are wall-clock times what was reserved: node_hours and gpu_hours of a scheduler's jobs,
core_hours of local ones; energy_kwh is 1 / 3.6e6 of the ledger's joules. A figure that no attempt
has is absent, never 0. A row belongs to a cell if its stage directory is that cell's alone; what
several cells share (data, base model, also a training) is charged to the grid: the grid's figure is
what is shared plus the sum of its cells, and that is the ledger's total.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from abf.cluster.slurm import ACTIVE, WAITING

Row = Mapping[str, Any]
"""A row of the ledger (schema LEDGER)."""

JOULES_A_KWH = 3.6e6
ALIVE = WAITING | ACTIVE
"""States of an attempt that goes on: queued (again) or running."""
HOURS = ("node_hours", "gpu_hours", "core_hours")
GROUP = "cost/"
"""Prefix of the metrics: their section in the UI."""


def ordered(rows: Iterable[Row]) -> list[Row]:
    """Rows by time, attempts of one job in their order."""
    return sorted(rows, key=lambda r: (r["submit_time"], r["rule"], r["run"], r["attempt"]))


def owners(cells: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """The one cell of every place that has only one.

    Args:
        cells: cell -> places (`{stage}/{key}`) that it uses.
    """
    users: dict[str, set[str]] = {}
    for cell, places in cells.items():
        for place in places:
            users.setdefault(place, set()).add(cell)
    return {place: next(iter(who)) for place, who in users.items() if len(who) == 1}


def by_place(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows by the place they worked on, `{stage}/{key}`."""
    found: dict[str, list[Row]] = {}
    for row in ordered(rows):
        found.setdefault(f"{row['rule']}/{row['run']}", []).append(row)
    return found


def has_failed(row: Row) -> bool:
    """Whether the attempt ended without completing, as the ledger counts; a requeue is such."""
    # The last attempt of a job that is about to go on is REQUEUED for a moment.
    return row["state"] != "COMPLETED" and row["state"] not in ALIVE - {"REQUEUED"}


def figures(rows: Sequence[Row]) -> dict[str, float]:
    """Costs of some rows by metric name (`cost/...`); what was not measured is left out."""
    joules = column_sum(rows, "energy_j")
    found = {
        "attempts": len(rows),
        "failed_attempts": sum(map(has_failed, rows)),
        **{name: column_sum(rows, name) for name in HOURS},
        "energy_kwh": None if joules is None else joules / JOULES_A_KWH,
    }
    return {f"{GROUP}{name}": float(value) for name, value in found.items() if value is not None}


def column_sum(rows: Sequence[Row], name: str) -> float | None:
    """The sum of a column; None if no row has it."""
    values = [row[name] for row in rows if row[name] is not None]
    return sum(values) if values else None


def energy_source(rows: Sequence[Row]) -> str:
    """Which meters measured how many of the attempts: `rapl:package 2 of 5 attempts`."""
    counts: dict[str, int] = {}
    for row in rows:
        if row["energy_j"] is not None:
            counts[row["energy_source"]] = counts.get(row["energy_source"], 0) + 1
    told = ", ".join(f"{source} {n} of {len(rows)} attempts" for source, n in counts.items())
    return told or "not measured"


def states(rows: Sequence[Row]) -> str:
    """How many attempts ended how: `1 REQUEUED, 2 COMPLETED`."""
    counts: dict[str, int] = {}
    for row in rows:
        counts[row["state"]] = counts.get(row["state"], 0) + 1
    return ", ".join(f"{n} {state}" for state, n in counts.items())


NO_BREAK = "\N{NO-BREAK SPACE}"
UNITS = {
    "attempts": "attempts",
    "failed_attempts": "not completed",
    "node_hours": "node-hours",
    "gpu_hours": "GPU-hours",
    "core_hours": "core-hours",
    "energy_kwh": "kWh",
}
"""What the figures are called in text."""


def cost_line(rows: Sequence[Row]) -> str:
    """One line of Markdown: `**2 attempts** (1 KILLED, 1 COMPLETED): 0.5 core-hours`."""
    found = figures(rows)
    hours = [
        f"{found[GROUP + name]:.4g} {UNITS[name]}"
        for name in (*HOURS, "energy_kwh")
        if GROUP + name in found
    ]
    meter = f"energy: {energy_source(rows)}"
    number = len(rows)
    head = f"**{number} attempt{'' if number == 1 else 's'}**" + (f" ({states(rows)})" * bool(rows))
    return f"{head}: {', '.join([*hours, meter])}"


def cost_table(
    groups: Mapping[str, Sequence[Row]], elsewhere: Mapping[str, Sequence[Row]]
) -> list[str]:
    """Markdown lines: one row a group (a stage) and their sum; units are in the head.

    Args:
        groups: rows that are summed.
        elsewhere: rows charged to another run; they follow the sum.
    """
    total = [row for rows in groups.values() for row in rows]
    have = figures([*total, *(row for rows in elsewhere.values() for row in rows)])
    # A column that nothing has says nothing.
    shown = [name for name in UNITS if f"{GROUP}{name}" in have]
    lines = [_line(["stage", *(UNITS[name] for name in shown)]), "|:--|" + "--:|" * len(shown)]
    for label, rows in [*groups.items(), ("**sum**", total), *elsewhere.items()]:
        found = figures(rows)
        cells = (found.get(f"{GROUP}{name}") for name in shown)
        lines.append(_line([label, *("" if cell is None else f"{cell:.4g}" for cell in cells)]))
    return lines


def _line(cells: Iterable[str]) -> str:
    """A line of a table; MLflow's pages put no room between columns, so the text has to."""
    return "".join(f"| {cell}{NO_BREAK} " for cell in cells) + "|"
