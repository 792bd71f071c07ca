"""CINECA's own books: what `saldo -b` prints, where that command exists.

Columns as documented (docs.hpc.cineca.it, "Budget and Accounting"): account, start, end, total,
localCluster consumed, totConsumed, totConsumed %, monthTotal, monthConsumed; hours are core-hours
of the local cluster, on Leonardo of Booster.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from datetime import date, datetime

from abf.cluster.slurm import call
from abf.errors import ClusterError

COLUMNS = 9


@dataclass(frozen=True)
class Saldo:
    """One account's budget, in core-hours."""

    account: str
    start: date
    end: date
    """Last day of the grant."""
    total: float
    consumed: float
    """On this cluster."""
    month_total: float
    """This month's share; beyond it jobs still run, at a lower priority."""
    month_consumed: float


def read_saldo() -> dict[str, Saldo] | None:
    """This user's budgets by account; None where the command does not exist.

    Raises:
        ClusterError: it failed, or prints something else than documented.
    """
    if shutil.which("saldo") is None:
        return None
    return parse_saldo(call("saldo", "-b"))


def parse_saldo(text: str) -> dict[str, Saldo]:
    """Budgets in what `saldo -b` printed; its headings hold no dates and are passed over.

    Raises:
        ClusterError: no line has the documented columns though some name an account.
    """
    found = {}
    for line in text.splitlines():
        words = line.split()
        if len(words) != COLUMNS or not (words[1].isdigit() and words[2].isdigit()):
            continue
        start, end = (datetime.strptime(word, "%Y%m%d").date() for word in words[1:3])
        total, consumed, month_total, month_consumed = (
            float(words[i].replace(",", "")) for i in (3, 4, 7, 8)
        )
        found[words[0]] = Saldo(words[0], start, end, total, consumed, month_total, month_consumed)
    if not found and any(word.isdigit() and len(word) == 8 for word in text.split()):
        raise ClusterError(
            f"saldo -b prints other columns than documented ({COLUMNS}: account, start, end, "
            f"total, consumed ...); its output began: {text[:300]!r}"
        )
    return found
