"""What an account has spent and given away in node-hours, and the caps that bind.

node_hours = elapsed_s / 3600 * billing / billing of a full node (32 on Leonardo). A job that runs
has spent its time so far and has committed the rest of its time limit; one that waits has
committed its whole time limit. Attempts come from the scheduler's records, all users' where an
account counts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from abf.artifacts import PlanDocument
from abf.cluster import slurm
from abf.cluster.config import AllocationConfig, LaunchConfig, SiteConfig
from abf.cluster.history import Attempt, history
from abf.cluster.jobs import Known, by_comment
from abf.errors import BudgetError
from abf.ledger.slurm import fresh_records, kept_records


@dataclass(frozen=True)
class Used:
    """Node-hours at one moment."""

    at: float
    """Unix seconds."""
    who: str
    """Account and first day it counts from, or our own jobs."""
    spent_node_hours: float = 0.0
    committed_node_hours: float = 0.0
    by_comment: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """Spent and committed node-hours of our jobs, by what the scheduler was told of them."""

    def of(self, places: Iterable[str]) -> tuple[float, float]:
        """Node-hours spent and committed by our jobs on these stage directories."""
        known = self.by_comment
        found = [known[c] for c in by_comment(places) if c in known]
        return sum(spent for spent, _ in found), sum(committed for _, committed in found)


@dataclass(frozen=True)
class Limit:
    """A cap and everything that counts against it, in node-hours."""

    name: str
    remedy: str
    """What to do when it is reached."""
    cap_node_hours: float
    spent_node_hours: float
    committed_node_hours: float
    reserved_node_hours: float = 0.0

    def check(self, what: str, node_hours: float, *, as_name: str) -> None:
        """Refuse what does not fit.

        Args:
            what: subject of the sentence.
            node_hours: what it may cost at most.
            as_name: what these hours are called in the sum.

        Raises:
            BudgetError: it would go past the cap; gives the sum.
        """
        parts = {
            "spent": self.spent_node_hours,
            "committed to running and queued jobs at their time limits": self.committed_node_hours,
            "reserved for jobs being submitted": self.reserved_node_hours,
            as_name: node_hours,
        }
        total = sum(parts.values())
        if total <= self.cap_node_hours * (1 + 1e-9):
            return
        shown = " + ".join(f"{figure(hours)} {name}" for name, hours in parts.items() if hours)
        raise BudgetError(
            f"{what} does not fit {self.name}: {shown} = {figure(total)} of "
            f"{figure(self.cap_node_hours)} node-hours, {figure(total - self.cap_node_hours)} too "
            f"many. Running jobs finish. {self.remedy}; `abf budget` shows who spent what"
        )


def figure(hours: float) -> str:
    """Hours as text: hundredths, or three digits below 0.1: `90,000.00`, `0.30`, `0.0278`."""
    small = 0.0001 <= abs(hours) < 0.0995
    return f"{hours:.3g}" if small else f"{hours:,.2f}"


# --- arithmetic --------------------------------------------------------------------------------


def spent_node_hours(
    attempt: Attempt, *, full_billing: float, begin: float = 0, end: float = float("inf")
) -> float:
    """Node-hours of an attempt; only its part within [begin, end) (Unix seconds), by time."""
    if attempt.start is None or not attempt.elapsed_s:
        return 0.0
    last = attempt.start + attempt.elapsed_s if attempt.end is None else attempt.end
    length = max(last - attempt.start, 1)
    share = max(0.0, min(last, end) - max(attempt.start, begin)) / length
    return attempt.elapsed_s / 3600 * attempt.billing / full_billing * min(share, 1.0)


def committed_node_hours(attempt: Attempt, site: SiteConfig, *, whole_nodes: int = 0) -> float:
    """What a job in the queue may still spend before its time limit ends it.

    Args:
        whole_nodes: nodes that a waiting job wants for itself; the scheduler's own estimate of a
            waiting job counts only the cores it asked for.
    """
    if attempt.end is not None or attempt.state in slurm.ENDED:
        return 0.0
    minutes = site.max_minutes if attempt.limit_min is None else attempt.limit_min
    billing = attempt.billing
    if attempt.start is None:
        billing = max(attempt.requested_billing, whole_nodes * site.node.billing)
    left_s = max(0, 60 * minutes - attempt.elapsed_s)
    return left_s / 3600 * billing / site.node.billing * attempt.tasks


def allocation_bounds(allocation: AllocationConfig) -> tuple[float, float]:
    """Unix seconds [begin, end) of an allocation; days are taken in UTC."""
    begin = datetime(*allocation.start.timetuple()[:3], tzinfo=UTC).timestamp()
    return begin, datetime(*allocation.end.timetuple()[:3], tzinfo=UTC).timestamp() + 86_400


def job_node_hours(plan: LaunchConfig, site: SiteConfig) -> float:
    """What one job of a launch plan may spend: full nodes for its whole time limit."""
    return plan.nodes * min(plan.minutes, site.max_minutes) / 60


def measure(results: Path, site: SiteConfig) -> tuple[Used, list[Attempt]]:
    """Ask the scheduler, whole account where there is an allocation, else our own jobs.

    Returns:
        the sums, and every attempt behind them.

    Raises:
        ClusterError: the accounting or the queue does not answer.
    """
    allocation = site.allocation
    begin, end = (0.0, float("inf")) if allocation is None else allocation_bounds(allocation)
    at = time.time()
    if begin > at:
        attempts = mine = []  # sacct refuses to be asked about the future
    elif allocation is None:
        attempts = mine = list(fresh_records(results).values())
    else:
        attempts = list(history(since=int(begin), account=site.account, everybody=True))
        ours = Known(results)
        mine = list((kept_records(results) | {a.key: a for a in attempts if a in ours}).values())
    mine = with_comments(mine)
    waiting = any(a.start is None and a.end is None for a in attempts)
    whole = _whole_nodes(site.account) if waiting else {}
    full = site.node.billing
    used = Used(
        at=at,
        who=whose(site),
        spent_node_hours=sum(
            spent_node_hours(a, full_billing=full, begin=begin, end=end) for a in attempts
        ),
        committed_node_hours=sum(
            committed_node_hours(a, site, whole_nodes=whole.get(a.job_id, 0)) for a in attempts
        ),
        by_comment=use_by_comment(mine, site, whole_nodes=whole),
    )
    return used, attempts


def with_comments(attempts: Sequence[Attempt]) -> list[Attempt]:
    """Attempts with what the controller was told of those that have not ended: its database hears
    of a job's comment only when the job ends.

    Raises:
        ClusterError: the queue does not answer.
    """
    bare = {a.job_id for a in attempts if not a.comment and a.end is None}
    said = {job.job_id: job.comment for job in slurm.queue()} if bare else {}
    return [a if a.comment else replace(a, comment=said.get(a.job_id, "")) for a in attempts]


def use_by_comment(
    attempts: Iterable[Attempt], site: SiteConfig, *, whole_nodes: Mapping[str, int] | None = None
) -> dict[str, tuple[float, float]]:
    """Node-hours spent and committed, by what the scheduler was told of the jobs.

    Args:
        whole_nodes: nodes that waiting jobs want for themselves, by job id.
    """
    found: dict[str, tuple[float, float]] = {}
    for attempt in attempts:
        spent, given = found.get(attempt.comment, (0.0, 0.0))
        whole = (whole_nodes or {}).get(attempt.job_id, 0)
        found[attempt.comment] = (
            spent + spent_node_hours(attempt, full_billing=site.node.billing),
            given + committed_node_hours(attempt, site, whole_nodes=whole),
        )
    return found


def whose(site: SiteConfig) -> str:
    return f"{site.account} since {site.allocation.start}" if site.allocation else "own jobs"


def _whole_nodes(account: str) -> dict[str, int]:
    """Nodes of waiting jobs that share them with nobody, by job id."""
    text = slurm.call(
        "squeue", "--noheader", "--states=PENDING", f"--account={account}", "--format=%A %h %D"
    )
    rows = [line.split() for line in text.splitlines()]
    return {job: int(nodes) for job, shared, nodes in rows if shared == "NO"}


# --- plans and their caps ----------------------------------------------------------------------


def limits(
    plans: Sequence[PlanDocument],
    used: Used,
    site: SiteConfig,
    *,
    reserved: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Limit]:
    """The allocation, and the cap of each of these studies that has one.

    Args:
        reserved: reservations by place.
    """
    found, reserved = [], reserved or {}
    if site.allocation is not None:
        found.append(
            Limit(
                name=f"the allocation of {site.account}, colleagues' jobs included",
                remedy="Wait for queued jobs (most end before their time limit), lower "
                "launch.nodes or launch.minutes, leave out cells, or put what was granted in "
                "addition into allocation.node_hours of the site file",
                cap_node_hours=site.allocation.node_hours,
                spent_node_hours=used.spent_node_hours,
                committed_node_hours=used.committed_node_hours,
                reserved_node_hours=sum(r["node_hours"] for r in reserved.values()),
            )
        )
    for plan in plans:
        if plan.get("cap_node_hours") is None:
            continue
        places = set(plan["stages"])
        spent, committed = used.of(places)
        found.append(
            Limit(
                name=f"the cap of study {plan['study']}",
                remedy="Lower launch.nodes or launch.minutes, leave out cells, or raise "
                f"budget.cap_node_hours of the study ({plan['grid']}) and plan it again",
                cap_node_hours=plan["cap_node_hours"],
                spent_node_hours=spent,
                committed_node_hours=committed,
                reserved_node_hours=sum(
                    r["node_hours"] for place, r in reserved.items() if place in places
                ),
            )
        )
    return found


def check_dates(site: SiteConfig, *, today: date | None = None) -> None:
    """Refuse to submit outside the allocation's days.

    Raises:
        BudgetError: it has ended, or not begun.
    """
    allocation = site.allocation
    today = today or datetime.now(UTC).date()
    if allocation is not None and not allocation.start <= today <= allocation.end:
        verb = "ended on" if today > allocation.end else "begins only on"
        day = allocation.end if today > allocation.end else allocation.start
        raise BudgetError(
            f"the allocation of {site.account} {verb} {day}: the scheduler takes no jobs for it; "
            "correct allocation.start and allocation.end in the site file, or use another account"
        )
