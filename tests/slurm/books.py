"""The ledger held against the scheduler's own books, which are asked for all jobs of a folder.

Not for the jobs that the ledger knows: one that is missing from it would not be missed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from typing import Any

import pytest

FULL_BILLING = 32
"""What an hour of a full node is billed."""


def assert_same(rows: Iterable[Mapping[str, Any]], told: Iterable[Mapping[str, str]]) -> None:
    """The ledger's rows are sacct's: the same attempts, to the second, at the same price."""
    ledger = sorted(rows, key=lambda r: (r["job_id"], r["submit_time"]))
    books = sorted(told, key=lambda r: (r["JobIDRaw"], r["Submit"]))
    ours = [(r["job_id"], r["submit_time"], r["state"], r["elapsed_s"]) for r in ledger]
    theirs = [
        (r["JobIDRaw"], _utc(r["Submit"]), r["State"].split()[0], float(r["ElapsedRaw"]))
        for r in books
    ]
    assert ours == theirs, f"ledger {ours}, sacct {theirs}"  # pytest explains none of this module's
    for row, book in zip(ledger, books, strict=True):
        tres = dict(part.split("=") for part in book["AllocTRES"].split(",") if part)
        hours = int(book["ElapsedRaw"]) / 3600
        billed = float(tres.get("billing", 0)) / FULL_BILLING
        assert row["node_hours"] == pytest.approx(hours * billed)
        assert row["gpu_hours"] == pytest.approx(hours * int(tres.get("gres/gpu", 0)))


def _utc(local: str) -> str:
    return datetime.fromisoformat(local).astimezone(UTC).isoformat(timespec="seconds")
