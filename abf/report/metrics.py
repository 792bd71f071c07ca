"""What each metric is called on the page, which way is better, and which go into which table."""

from __future__ import annotations

from typing import NamedTuple

from abf.report.intervals import ERROR, PLAIN, RATE, SHARE, Scale


class MetricText(NamedTuple):
    """Words for one metric."""

    label: str
    better: str = ""
    """`lower`, `higher`, or "" where neither is."""


AR = "ar_bits_per_byte"
BASE = "base_bits_per_byte"
BOUND = "bound_bits_per_byte"
BOUND_CUTS = "bound_with_boundary_bits_per_byte"
TPF = "tokens_per_forward"
EXACT = "exact_match"
ERRORS = "word_errors"
SPEED = "tokens_per_second"
FLOPS = "forward_flops_per_token"
JOULES = "joules_per_token"
NOISE = "bound_monte_carlo_error"
CUT_BITS = "boundary_bits_per_block"
BLOCK_LENGTH = "mean_block_length"

HEADLINE = (BLOCK_LENGTH, AR, BOUND, BOUND_CUTS, CUT_BITS)
"""Columns of the table of held-out text."""
NOISY = (BOUND, BOUND_CUTS)
"""Bounds that are estimated from noise draws; NOISE is their standard error."""
COMPARED = (AR, BOUND, BOUND_CUTS)
"""What arms are compared by, pair by pair, and shown in a figure."""
DECODING = (TPF, EXACT, ERRORS, BASE, "distinct_2", "repeated_4", SPEED, FLOPS, JOULES)
"""Columns of the table of generated text; everything else is in the list of all scores."""

_TEXTS = {
    AR: MetricText("AR view", "lower"),
    BASE: MetricText("Base model", "lower"),
    BOUND: MetricText("Block bound, cuts given", "lower"),
    BOUND_CUTS: MetricText("Block bound with boundary bits", "lower"),
    TPF: MetricText("Tokens per forward", "higher"),
    EXACT: MetricText("Right answers", "higher"),
    ERRORS: MetricText("Wrong words", "lower"),
    SPEED: MetricText("Speed here", "higher"),
    FLOPS: MetricText("Modelled work", "lower"),
    JOULES: MetricText("Energy", "lower"),
    CUT_BITS: MetricText("Boundary bits", "lower"),
    BLOCK_LENGTH: MetricText("Mean block"),
    "distinct_2": MetricText("Distinct 2-grams"),
    "repeated_4": MetricText("Repeated 4-grams"),
}

_RATES = (
    *("tokens/s", "J/token", "FLOP/token", "rows/token"),
    *("tokens/forward", "forwards/request", "tokens/request"),
)


def scale_of(metric: str, unit: str) -> Scale:
    """Scale on which a metric is averaged over seeds."""
    if metric == NOISE:
        return ERROR
    if unit == "share":
        return SHARE
    return RATE if unit in _RATES else PLAIN


def describe(metric: str, *, generated: bool = False) -> MetricText:
    """Words for a metric, of held-out or of generated text; an unknown one keeps its name."""
    if generated and metric == BASE:
        return MetricText("Generated text under the base model", "lower")
    return _TEXTS.get(metric) or MetricText(metric.replace("_", " "))
