"""What is left of a budget, by the scheduler's cap, by the site's books, and by the calendar.

Pure functions, like `abf.cluster.checks`. Amounts are node-hours.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from datetime import date, timedelta

from abf.cluster.checks import Finding, fail, ok, warn
from abf.cluster.config import LaunchConfig, NodeConfig, SiteConfig
from abf.cluster.limits import Usage
from abf.cluster.saldo import Saldo

END_NEAR = timedelta(days=14)
RESOURCES = {"billing": "billing", "node": None, "cpu": "cores", "gres/gpu": "gpus"}
"""Resources that a budget is capped in, and the NodeConfig field that makes them nodes."""


def in_node_hours(resource: str, amount: float, node: NodeConfig) -> float:
    """TRES-minutes of one resource as hours of full nodes."""
    field = RESOURCES[resource]
    return amount / 60 / (1.0 if field is None else float(getattr(node, field)))


def scheduler_budget(
    site: SiteConfig, usage: Usage, decay: str, plans: Iterable[LaunchConfig]
) -> Iterator[Finding]:
    """What the scheduler's own cap leaves, against the allocation and the largest job."""
    caps = [
        name
        for name in usage.caps
        if name in RESOURCES and getattr(site.node, RESOURCES[name] or "cores") > 0
    ]
    if not caps:
        yield warn(
            "budget",
            f"the scheduler holds no cap for {site.account}: nothing but `abf` stops at the "
            "allocation",
        )
        return
    left, name = min((in_node_hours(r, usage.left(r), site.node), r) for r in caps)
    cap = in_node_hours(name, usage.caps[name], site.node)
    text = f"{left:,.1f} of {cap:,.1f} node-hours left to {site.account} (cap on {name})"
    need, largest = max(
        ((p.nodes * min(p.minutes, site.max_minutes) / 60, p) for p in plans),
        key=lambda pair: pair[0],
        default=(0.0, None),
    )
    if left <= 0:
        yield fail("budget", f"{text}: no job will start; ask the PI for an extension")
    elif largest is not None and need > left:
        yield fail(
            "budget",
            f"{text}: a job of {largest.nodes} node(s) reserves {need:,.1f} and would wait for "
            "ever; lower launch.minutes",
        )
    elif decay not in ("00:00:00", ""):
        yield warn("budget", f"{text}; usage halves every {decay}, so this is no allocation")
    else:
        yield ok("budget", text)
    granted = site.allocation.node_hours if site.allocation else None
    if granted is not None and abs(granted - cap) > 0.01 * granted:
        yield warn(
            "budget",
            f"allocation.node_hours={granted:,.0f}, but the scheduler stops at {cap:,.0f}: correct "
            "the site file, or ask the PI",
        )


def allocation(site: SiteConfig, today: date) -> Finding:
    """Whether the grant is running today."""
    grant = site.allocation
    if grant is None:
        return warn(
            "allocation",
            "the site file says nothing of it, so nothing is refused: add `allocation: "
            "{node_hours: N, start: YYYY-MM-DD, end: YYYY-MM-DD}`",
        )
    return _period("allocation", "allocation", grant.start, grant.end, today)


def _period(what: str, whose: str, start: date, end: date, today: date) -> Finding:
    if today > end:
        return fail(
            what, f"{whose} ended on {end}: jobs are refused from then on, whatever hours are left"
        )
    if today < start:
        return fail(what, f"{whose} begins on {start}: jobs are refused until then")
    days = (end - today).days
    if end - today < END_NEAR:
        return warn(what, f"{whose} ends on {end}, in {days} day(s)")
    return ok(what, f"{whose} ends on {end}, in {days} days")


def saldo(site: SiteConfig, books: Mapping[str, Saldo], today: date) -> Iterator[Finding]:
    """What the site's own books say; they are what is paid by."""
    row = books.get(site.account)
    if row is None:
        known = ", ".join(sorted(books)) or "none"
        yield fail(
            "saldo",
            f"`saldo -b` has no account {site.account!r}; it has {known}: correct `account`",
        )
        return
    hours = site.node.cores
    left, total = (row.total - row.consumed) / hours, row.total / hours
    text = f"{left:,.1f} of {total:,.1f} node-hours left ({row.total:,.0f} core-hours / {hours})"
    if left <= 0:
        yield fail("saldo", f"{text}: jobs will be refused; ask the PI for an extension")
    elif row.month_consumed > row.month_total:
        yield warn(
            "saldo",
            f"{text}; this month {row.month_consumed / hours:,.1f} of "
            f"{row.month_total / hours:,.1f} are used: jobs wait longer until next month",
        )
    else:
        yield ok("saldo", text)
    yield _period("saldo", f"the grant of {row.account}", row.start, row.end, today)
    grant = site.allocation
    if grant is not None and (
        abs(grant.node_hours - total) > 0.01 * total
        or (grant.start, grant.end) != (row.start, row.end)
    ):
        yield warn(
            "saldo",
            f"the site file says {grant.node_hours:,.0f} node-hours from {grant.start} to "
            f"{grant.end}, saldo {total:,.0f} from {row.start} to {row.end}: correct `allocation`",
        )
