"""What was spent, is committed and is to come, in node-hours, of the studies of a results folder.

Days and months are those of UTC. A month's share of the allocation is its share of the days, as
`saldo -b` has it (monthTotal = total * days / all days).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from abf.artifacts import PlanDocument, read_plans
from abf.cluster.config import SiteConfig
from abf.cluster.history import Attempt
from abf.errors import ArtifactError
from abf.ledger.budget import Limit, Used, allocation_bounds, limits, measure, spent_node_hours
from abf.ledger.forecast import Forecast, forecast
from abf.ledger.reserve import open_reservations
from abf.ledger.work import work_done, work_left


@dataclass(frozen=True)
class Month:
    """One month, or the part of it that lies in the allocation."""

    name: str
    spent_node_hours: float
    share_node_hours: float | None
    """Of the allocation, by days; none without one."""
    begun: bool


@dataclass(frozen=True)
class Books:
    """Everything that is printed."""

    site: SiteConfig
    used: Used
    attempts: Sequence[Attempt]
    reserved: Mapping[str, Mapping[str, float]]
    plans: Sequence[PlanDocument]
    """Of all studies."""
    wanted: Sequence[PlanDocument]
    """Of those that are forecast."""
    forecast: Forecast
    results: Path

    def limits(self) -> list[Limit]:
        """The allocation and the caps of the forecast studies."""
        return limits(self.wanted, self.used, self.site, reserved=self.reserved)


def open_books(results: Path, site: SiteConfig, study: str | None = None) -> Books:
    """Ask the scheduler and read the plans.

    Args:
        study: name of the one to forecast; None: all that are planned.

    Raises:
        ClusterError: the accounting does not answer.
        ArtifactError: there is no plan of that name.
    """
    plans = read_plans(results)
    wanted = [plan for plan in plans if study in (None, plan["study"])]
    if study is not None and not wanted:
        raise ArtifactError(f"{results}/plan holds no study {study}; `abf plan` writes it")
    used, attempts = measure(results, site)
    done = work_done(used, results)
    left = work_left((place for plan in wanted for place in plan["stages"]), used, results)
    reserved = open_reservations(results, attempts, site)
    return Books(site, used, attempts, reserved, plans, wanted, forecast(left, done), results)


def refuse(books: Books) -> None:
    """Raise BudgetError for the first limit that the forecast's upper end would pass."""
    high = books.forecast.high_node_hours
    for limit in books.limits():
        names = ", ".join(plan["study"] for plan in books.wanted)
        limit.check(f"what is left of {names}", high, as_name="forecast (upper end)")


def months(books: Books) -> list[Month]:
    """Node-hours by month, jobs over midnight of a month's last day divided by time."""
    allocation, now = books.site.allocation, books.used.at
    starts = [a.start for a in books.attempts if a.start is not None]
    if allocation is not None:
        begin, end = allocation_bounds(allocation)
    elif starts:
        begin, end = min(starts), now + 1
    else:
        return []
    full, found = books.site.node.billing, []
    for first, last, name in _spans(begin, end):
        # Most jobs lie in no other month: a look at two numbers passes them by.
        spent = sum(
            spent_node_hours(a, full_billing=full, begin=first, end=last)
            for a in books.attempts
            if a.start is not None and a.start < last and (a.end is None or a.end > first)
        )
        share = None
        if allocation is not None:
            share = allocation.node_hours * (last - first) / (end - begin)
        found.append(Month(name, spent, share, first <= now))
    return found


def _spans(begin: float, end: float) -> Iterator[tuple[float, float, str]]:
    first = begin
    while first < end:
        day = datetime.fromtimestamp(first, UTC)
        year, month = (day.year + 1, 1) if day.month == 12 else (day.year, day.month + 1)
        last = min(datetime(year, month, 1, tzinfo=UTC).timestamp(), end)
        yield first, last, f"{day:%Y-%m}"
        first = last
