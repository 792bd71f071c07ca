"""Numbers as people read them: as many digits as their interval supports."""

from __future__ import annotations

import math

from abf.report.costs import Cost
from abf.report.intervals import Interval
from abf.report.tables import Difference, Estimate

NOT_MEASURED = "not measured"
NONE = "\N{EN DASH}"
MOST_PLACES = 6


def decimals(value: float, *intervals: Interval | None) -> int:
    """Decimal places that show two digits of the widest interval, and at most five digits in all.

    An end that is not 0 is never rounded to 0: whether an interval leaves out 0 must be seen.
    """
    widths = [i.high - i.low for i in intervals if i is not None and i.high > i.low]
    size = max(widths) / 2 if widths else abs(value) / 100
    places = 2 if size <= 0 else 1 - math.floor(math.log10(size))
    if value:
        places = min(places, 4 - math.floor(math.log10(abs(value))))
    places = min(max(places, 0), MOST_PLACES)
    ends = [abs(end) for i in intervals if i is not None for end in i if end]
    while places < MOST_PLACES and any(round(end, places) == 0 for end in ends):
        places += 1
    return places


def number(value: float | None, places: int) -> str:
    """A number, or that it was not measured."""
    if value is None or not math.isfinite(value):
        return NOT_MEASURED
    return f"{value:,.{places}f}".replace("-", "\N{MINUS SIGN}")


def interval(found: Interval | None, places: int) -> str:
    """`[low, high]`, or a dash where there is none."""
    if found is None:
        return NONE
    return f"[{number(found.low, places)}, {number(found.high, places)}]"


def estimate_text(estimate: Estimate | None, noise: Estimate | None = None) -> dict[str, str]:
    """Mean, both intervals, and the Monte-Carlo error of an estimated bound as text."""
    if estimate is None:
        return {"mean": NONE, "note": "", "seeds": "", "documents": "", "noise": ""}
    note = "; ".join(estimate.notes)
    if estimate.mean is None or not math.isfinite(estimate.mean):
        return {"mean": NOT_MEASURED, "note": note, "seeds": "", "documents": "", "noise": ""}
    size, suffix = _scale(estimate.mean)
    mean = estimate.mean / size
    seeds, documents = (
        found and Interval(found.low / size, found.high / size)
        for found in (estimate.over_seeds, estimate.over_documents)
    )
    places = decimals(mean, seeds, documents)
    return {
        "mean": number(mean, places) + suffix,
        "seeds": _seeds(seeds, len(estimate.values), places),
        "documents": interval(documents, places),
        "noise": "" if noise is None else _error(noise.mean),
        "note": note,
    }


def _error(value: float | None) -> str:
    """A standard error with two digits."""
    if value is None:
        return NOT_MEASURED
    return f"±{number(value, decimals(0.0, Interval(-value, value)))}"


def _seeds(found: Interval | None, n: int, places: int) -> str:
    if found is None:
        return f"none, n = {n}"
    return "all equal" if found.low == found.high else interval(found, places)


def _scale(value: float) -> tuple[float, str]:
    """Factor and letter for numbers too long to read."""
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return size, f"\N{NO-BREAK SPACE}{letter}"
    return 1.0, ""


def difference_text(difference: Difference, confidence: float) -> dict[str, str]:
    """Mean difference with sign, both intervals, the adjusted p, and what they allow to say."""
    places = decimals(difference.mean, difference.over_seeds, difference.over_documents)
    sign = "+" if difference.mean > 0 else ""
    verdict = "none"
    if difference.separated(confidence):
        verdict = "higher" if difference.mean > 0 else "lower"
    return {
        "mean": sign + number(difference.mean, places),
        "seeds": interval(difference.over_seeds, places),
        "documents": interval(difference.over_documents, places),
        "p": probability(difference.p_adjusted),
        "verdict": verdict,
    }


def probability(p: float | None) -> str:
    """A p-value with two digits; a dash where there is none."""
    if p is None:
        return NONE
    return "< 0.001" if p < 0.001 else f"{p:#.2g}"


def share(part: int, whole: int) -> str:
    """`12 of 34 (35 %)`."""
    return f"{part:,} of {whole:,}" + (f" ({100 * part / whole:.0f} %)" if whole else "")


def hours(value: float | None) -> str:
    """Hours with three digits; a dash where there are none."""
    if value is None:
        return NONE
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def cost_text(cost: Cost) -> str:
    """Core-hours or node-hours with their unit."""
    if cost.node_hours is not None:
        return f"{hours(cost.node_hours)} node-h"
    return f"{hours(cost.core_hours)} core-h"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
