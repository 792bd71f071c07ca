"""The table of faults in docs/reliability.md, from what the tests of this folder measured.

    make reliability

Each test tells a `Report` what it did and how long it took until the work went on; with
ABF_RELIABILITY set these lines are kept in that file, from which the page is written.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

from tests.slurm.daemons import wait_for

VARIABLE = "ABF_RELIABILITY"
PAGE = Path(__file__).parents[2] / "docs" / "reliability.md"
BEGIN, END = "<!-- measured -->", "<!-- end of measured -->"


class Report:
    """Keeps lines of the table."""

    def __call__(self, fault: str, happened: str, seconds: float | None, lost: str = "") -> None:
        """One fault: what happened then, seconds until work went on, and what was lost."""
        if path := os.environ.get(VARIABLE):
            row = {"fault": fault, "happened": happened, "seconds": seconds, "lost": lost}
            with open(path, "a", encoding="utf-8") as handle:
                handle.write(json.dumps(row) + "\n")


def recovered(directory: Path, since: float, *, seconds: float = 120) -> float:
    """Wait until a training that was interrupted at `since` (Unix time) has made a new step.

    Returns:
        seconds from then to the record of its first new step.
    """
    found: list[float] = []

    def stepped() -> bool:
        records = map(json.loads, _lines(directory / "journal.jsonl"))
        later = [r for r in records if r["time"] > since]
        resumed = next((r["time"] for r in later if r.get("name") in ("resume", "start")), None)
        if resumed is not None:
            found.extend(r["time"] for r in later if r["kind"] == "metrics" and r["time"] > resumed)
        return bool(found)

    wait_for("a step after the fault", stepped, seconds=seconds, every=0.2)
    return found[0] - since


def event(directory: Path, name: str, *, seconds: float = 120) -> float:
    """Wait until a training's journal has this event; when it happened (Unix time)."""
    found: list[float] = []

    def happened() -> bool:
        records = map(json.loads, _lines(directory / "journal.jsonl"))
        found.extend(r["time"] for r in records if r.get("name") == name)
        return bool(found)

    wait_for(name, happened, seconds=seconds, every=0.2)
    return found[0]


def _lines(path: Path) -> list[str]:
    """Whole lines; the last one may be being written."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    return text[: text.rfind("\n") + 1].splitlines()


def table(rows: list[dict]) -> str:
    """The rows as Markdown."""
    lines = ["| fault | what happened | lost | seconds until work went on |", "|---|---|---|---:|"]
    for row in rows:
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.0f}"
        lost = row["lost"] or "nothing"
        lines.append(f"| {row['fault']} | {row['happened']} | {lost} | {seconds} |")
    return "\n".join(lines)


def main(path: Path) -> None:
    """Put the table between the marks of the page."""
    rows = [json.loads(line) for line in _lines(path)]
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    PAGE.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
