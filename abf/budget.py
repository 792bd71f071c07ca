"""`abf budget`: what was spent, is committed and is to come, as text and as a plot."""

from __future__ import annotations

import time
from pathlib import Path

from abf.cluster.config import SiteConfig
from abf.cluster.saldo import read_saldo
from abf.files import write_text
from abf.grid import load_study
from abf.ledger.books import Books, months, open_books, refuse
from abf.ledger.budget import (
    allocation_bounds,
    check_dates,
    figure,
    spent_node_hours,
)
from abf.ledger.forecast import INTERVAL
from abf.ledger.storage import measure_storage, storage_lines
from abf.ledger.work import calibration_cells
from abf.plan import Plan
from abf.site import load_site

DAY_S = 86_400
SALDO_LAG_S = DAY_S
"""saldo's books are closed once a day."""
ROUNDING = 0.005
"""Share by which two books may differ: one counts whole minutes."""


def check_plan(plan: Plan, site: SiteConfig) -> str:
    """Refuse a written plan that does not fit; what to tell the user of one that does.

    Nothing is asked of the scheduler where there is neither an allocation nor a cap.

    Raises:
        BudgetError: spent, committed and the forecast's upper end are more than a cap.
        ClusterError: the accounting does not answer.
    """
    if site.allocation is None and plan.cap_node_hours is None:
        return "budget: neither allocation nor budget.cap_node_hours is set; nothing is checked"
    check_dates(site)
    books = open_books(plan.results, site, plan.study.name)
    refuse(books)
    return "\n".join(_forecast_lines(books, str(plan.study.path)))


def show_budget(results: Path, study: Path | None, plot: Path | None) -> None:
    """Print the books, plot them, and refuse what does not fit.

    Args:
        study: grid or run YAML; its plan is written first, as `abf plan` does.
        plot: SVG file to write.

    Raises:
        BudgetError: after printing: the study does not fit its cap or the allocation.
    """
    site = load_site()
    plan = None
    if study is not None:
        plan = Plan(load_study(study), results)
        plan.write()
    books = open_books(results, site, plan.study.name if plan else None)
    print("\n".join(_page(books, str(study) if study else None)))
    if plot is not None:
        write_text(plot, burn_down(books))
        print(f"plot: {plot}")
    if plan is not None:
        check_dates(site)
        refuse(books)


# --- the page ----------------------------------------------------------------------------------


def _page(books: Books, study: str | None) -> list[str]:
    site, used = books.site, books.used
    allocation = site.allocation
    when = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(used.at))
    reserved = sum(entry["node_hours"] for entry in books.reserved.values())
    if allocation is None:
        head = f"own jobs of this folder (the site file names no allocation), {when}"
    else:
        head = (
            f"account {site.account}, {allocation.start} to {allocation.end}, "
            f"{figure(allocation.node_hours)} node-hours, {when}"
        )
    rows = [
        ("spent", used.spent_node_hours, "all attempts of all users, running ones so far"),
        ("committed", used.committed_node_hours, "running and queued jobs to their time limits"),
        ("reserved", reserved, "jobs being submitted"),
    ]
    lines = [
        head,
        *(f"  {name:<10}{figure(hours):>14} node-hours  {note}" for name, hours, note in rows),
    ]
    lines += _forecast_lines(books, study)
    for limit in books.limits():
        left = limit.cap_node_hours - limit.spent_node_hours - limit.committed_node_hours
        left -= limit.reserved_node_hours + books.forecast.high_node_hours
        lines.append(
            f"  {'left':<10}{figure(left):>14} node-hours  of {figure(limit.cap_node_hours)}, "
            f"{limit.name}, after the forecast's upper end"
        )
    lines += _month_lines(books) + _tables(books) + _saldo_lines(books)
    places = [place for plan in books.wanted for place in plan["stages"]]
    return lines + storage_lines(measure_storage(places, books.results, site.storage))


def _forecast_lines(books: Books, study: str | None) -> list[str]:
    found = books.forecast
    lines = []
    if found.kinds:
        lines.append(
            f"  {'forecast':<10}{figure(found.median_node_hours):>14} node-hours  "
            f"{INTERVAL:.0%} interval {figure(found.low_node_hours)} to "
            f"{figure(found.high_node_hours)}, beyond what is committed"
        )
    for kind in found.kinds:
        lines.append(
            f"    {kind.kind:<12}{kind.directories:>5} to do {figure(kind.median_node_hours):>12} "
            f"({figure(kind.low_node_hours)} to {figure(kind.high_node_hours)}), measured "
            f"{kind.measurements} time(s)" + (f"; {kind.note}" if kind.note else "")
        )
    if found.unmeasured:
        counts: dict[str, int] = {}
        for piece in found.unmeasured:
            counts[piece.kind] = counts.get(piece.kind, 0) + 1
        shown = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()))
        lines.append(
            f"  no forecast for {shown}: none was measured on these nodes. Calibrate with one cell:"
        )
        for plan in books.wanted:
            for name, score in calibration_cells(plan, found.unmeasured, books.results):
                lines.append(
                    f"    cell {name}: snakemake --profile leonardo --config "
                    f"study={study or plan['grid']} results={books.results} -- "
                    f"{books.results / score}/manifest.json"
                )
    return lines


def _month_lines(books: Books) -> list[str]:
    lines, spent, shared = (
        [f"{'month':<10}{'spent':>12}{'share':>12}{'left':>14}{'linear':>14}"],
        0.0,
        0.0,
    )
    allocation = books.site.allocation
    for month in months(books):
        spent += month.spent_node_hours
        shared += month.share_node_hours or 0.0
        line = f"{month.name:<10}{figure(month.spent_node_hours):>12}"
        if allocation is not None and month.share_node_hours is not None:
            left = figure(allocation.node_hours - spent) if month.begun else "-"
            linear = max(allocation.node_hours - shared, 0.0)  # not -0.00 at the end
            line += f"{figure(month.share_node_hours):>12}{left:>14}{figure(linear):>14}"
            if month.spent_node_hours > month.share_node_hours:
                line += "  WARNING: above its share: the scheduler lowers the priority"
        lines.append(line)
    return lines if len(lines) > 1 else []


def _tables(books: Books) -> list[str]:
    full = books.site.node.billing
    begin, end = 0.0, float("inf")
    if books.site.allocation is not None:
        begin, end = allocation_bounds(books.site.allocation)
    states: dict[str, list[float]] = {}
    users: dict[str, list[float]] = {}
    for a in books.attempts:
        hours = spent_node_hours(a, full_billing=full, begin=begin, end=end)
        for table, name in ((states, a.state), (users, a.user)):
            entry = table.setdefault(name, [0.0, 0])
            entry[0] += hours
            entry[1] += 1
    lines = []
    for title, table in (("state", states), ("user", users)):
        lines.append(f"{title:<16}{'node-hours':>14}{'attempts':>10}")
        ordered = sorted(table.items(), key=lambda item: -item[1][0])
        lines += [
            f"  {name:<14}{figure(hours):>14}{count:>10.0f}" for name, (hours, count) in ordered
        ]
    if books.plans:
        lines.append(f"{'study':<24}{'spent':>14}{'committed':>14}{'cap':>12}  node-hours")
    for plan in books.plans:
        spent, committed = books.used.of(set(plan["stages"]))
        cap = plan.get("cap_node_hours")
        lines.append(
            f"  {plan['study']:<22}{figure(spent):>14}{figure(committed):>14}"
            f"{'none' if cap is None else figure(cap):>12}"
        )
    if len(books.plans) > 1:
        lines.append("  what several studies share counts in each of them")
    return lines


def _saldo_lines(books: Books) -> list[str]:
    """Our sum against the site's own, where `saldo` exists."""
    site, used = books.site, books.used
    found = read_saldo()
    if found is None:
        return []
    if site.account not in found:
        return [f"saldo -b knows no account {site.account}; it lists {', '.join(found) or 'none'}"]
    book, full = found[site.account], site.node.billing
    theirs = book.consumed / full
    recent = sum(
        spent_node_hours(a, full_billing=full, begin=used.at - SALDO_LAG_S) for a in books.attempts
    )
    difference = used.spent_node_hours - theirs
    slack = ROUNDING * used.spent_node_hours
    agrees = -slack - 0.01 <= difference <= recent + slack + 0.01
    lines = [
        f"saldo -b: {book.consumed:,.0f} core-hours = {figure(theirs)} node-hours, sacct: "
        f"{figure(used.spent_node_hours)}; difference {figure(difference)}, "
        + (
            f"explained by what ran in the last day ({figure(recent)})"
            if agrees
            else f"WARNING: more than what ran in the last day ({figure(recent)}) explains"
        ),
        f"  this month: {figure(book.month_consumed / full)} of {figure(book.month_total / full)} "
        "node-hours",
    ]
    allocation = site.allocation
    if allocation is not None and abs(book.total / full - allocation.node_hours) > 1:
        lines.append(
            f"  WARNING: saldo grants {figure(book.total / full)} node-hours, the site file says "
            f"allocation.node_hours={figure(allocation.node_hours)}"
        )
    return lines


# --- the plot ----------------------------------------------------------------------------------


def burn_down(books: Books) -> str:
    """SVG: how much is left month by month, against the linear course, and what is to come."""
    from abf.report.svg import FAINT, PALETTE, Style, svg_text

    allocation, rows = books.site.allocation, months(books)
    total = allocation.node_hours if allocation else 0.0
    course, linear = [total], [total]
    for month in rows:
        course.append(course[-1] - month.spent_node_hours)
        linear.append(linear[-1] - (month.share_node_hours or 0.0))
    begun = sum(month.begun for month in rows)
    with Style() as plt:
        figure, axis = plt.subplots(figsize=(8, 3.6))
        if allocation is not None:
            axis.plot(range(len(linear)), linear, "--", color=FAINT, label="linear by days")
        axis.plot(range(begun + 1), course[: begun + 1], "-o", color=PALETTE[0], label="left")
        now = course[begun] - books.used.committed_node_hours
        axis.plot([begun], [now], "v", color=PALETTE[4], label="less committed")
        found = books.forecast
        middle = now - found.median_node_hours
        ends = [[found.high_node_hours - found.median_node_hours],
                [found.median_node_hours - found.low_node_hours]]  # fmt: skip
        label = f"less forecast, {INTERVAL:.0%} interval"
        axis.errorbar(
            [begun], [middle], yerr=ends, fmt="s", color=PALETTE[1], capsize=4, label=label
        )
        axis.axhline(0, color=FAINT, lw=0.8)
        axis.set_xticks(range(len(rows) + 1), ["begin", *(month.name for month in rows)])
        axis.set_ylabel("node-hours left" if allocation else "node-hours (no allocation: below 0)")
        axis.set_title(f"{books.site.account}: node-hours left at the end of each month")
        axis.legend()
        return svg_text(figure)
