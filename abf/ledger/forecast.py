"""What unfinished stage directories will cost in node-hours, from what finished ones did cost.

Method. A directory costs work x rate. The work of a training is clean tokens x parameters, so its
rate is node-seconds per token and parameter (the cost of a step is proportional to both, and a node
does the same work beside others as alone); every other directory is work 1, its rate node-seconds.
Rates of one kind are log-normal: with mean m and deviation s of n measured logarithms, a new
directory's logarithm is m + e + d, e ~ N(0, s^2 / n) shared by all of them, d ~ N(0, s^2) its own.
The sum over directories of work w_j is taken as log-normal with the same mean and variance (Fenton
and Wilkinson): deviation t of the own parts, t^2 = ln(1 + (exp(s^2) - 1) sum w_j^2 / (sum w_j)^2).
Its 90 % interval is that of Student's t with the n - 1 degrees of freedom of s. Measurements with
the same parameters go before those that have to be scaled. One measurement has no spread: s is then
pooled from the kinds that have one, and where there is none a factor of 2 either way is assumed,
and said. Ends of kinds are added, as if all were dear or cheap at once: too wide rather than too
narrow. Without a measurement there is no figure.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

INTERVAL = 0.90
SAME_SIZE = 0.01
"""Models whose parameters differ by less than this share are of one size."""
SPREAD_FLOOR = 0.05
"""Deviation of a logarithm; two equal measurements prove no exact clockwork."""
ASSUMED_FACTOR = 2.0


@dataclass(frozen=True)
class Measurement:
    """A finished directory."""

    kind: str
    """Stage, and for trainings the objective."""
    node_seconds: float
    """Over all its attempts, failed ones included: they are part of what it costs."""
    work: float = 1.0
    size: float | None = None
    """Parameters, for trainings."""


@dataclass(frozen=True)
class Planned:
    """An unfinished directory."""

    place: str
    kind: str
    work: float = 1.0
    """What is left of it."""
    size: float | None = None
    committed_node_hours: float = 0.0
    """Already given to a job that works on it: not to be counted twice."""


@dataclass(frozen=True)
class KindForecast:
    """Node-hours still to come for the directories of one kind and size."""

    kind: str
    directories: int
    measurements: int
    low_node_hours: float
    median_node_hours: float
    high_node_hours: float
    note: str
    """On what the interval rests, when not on the spread of these measurements."""


@dataclass(frozen=True)
class Forecast:
    """Node-hours still to come, beyond what jobs in the queue may spend."""

    kinds: tuple[KindForecast, ...]
    unmeasured: tuple[Planned, ...]
    """Of these nothing is known, and nothing is in the sums."""

    @property
    def low_node_hours(self) -> float:
        """Lower end of the interval."""
        return sum(kind.low_node_hours for kind in self.kinds)

    @property
    def median_node_hours(self) -> float:
        """Sum of the medians."""
        return sum(kind.median_node_hours for kind in self.kinds)

    @property
    def high_node_hours(self) -> float:
        """Upper end of the interval: what has to fit."""
        return sum(kind.high_node_hours for kind in self.kinds)


def forecast(planned: Sequence[Planned], measured: Sequence[Measurement]) -> Forecast:
    """Cost of the planned directories by kind; the method is the module's docstring."""
    groups: dict[tuple[str, float | None], list[Planned]] = {}
    unmeasured = []
    for piece in planned:
        rates = [m for m in measured if m.kind == piece.kind and m.node_seconds > 0]
        sized = [m for m in rates if _same(m.size, piece.size)]
        if not rates or (piece.size is None and not sized):
            unmeasured.append(piece)
        else:
            groups.setdefault((piece.kind, piece.size if sized else None), []).append(piece)
    pooled = _pooled_spread(measured)
    kinds = []
    for (kind, size), pieces in groups.items():
        same = [m for m in measured if m.kind == kind and m.node_seconds > 0]
        scaled = size is None and pieces[0].size is not None
        if not scaled:
            same = [m for m in same if _same(m.size, pieces[0].size)]
        kinds.append(_kind(kind, pieces, same, pooled=pooled, scaled=scaled))
    return Forecast(tuple(kinds), tuple(unmeasured))


def _same(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return abs(one - other) <= SAME_SIZE * max(one, other)


def _kind(
    kind: str,
    planned: Sequence[Planned],
    measured: Sequence[Measurement],
    *,
    pooled: tuple[float, int] | None,
    scaled: bool,
) -> KindForecast:
    logs = [math.log(m.node_seconds / m.work) for m in measured]
    mean, notes = statistics.fmean(logs), []
    if len(logs) > 1:
        spread, freedom = statistics.stdev(logs), len(logs) - 1
    elif pooled is not None:
        spread, freedom = pooled
        notes.append("measured once: the spread is that of the other kinds")
    else:
        spread, freedom = math.log(ASSUMED_FACTOR) / normal_quantile(), None
        notes.append(f"measured once: a factor of {ASSUMED_FACTOR:g} either way is assumed")
    spread = max(spread, SPREAD_FLOOR)
    if scaled:
        sizes = sorted(m.size for m in measured if m.size is not None)
        notes.append(f"scaled from models of {sizes[0]:.3g} to {sizes[-1]:.3g} parameters")
    works = []
    for piece in planned:
        expected = piece.work * math.exp(mean) / 3600
        left = max(0.0, 1 - piece.committed_node_hours / expected) if expected else 0.0
        works.append(piece.work * left)
    total = sum(works)
    if not total:
        return KindForecast(kind, len(planned), len(logs), 0.0, 0.0, 0.0, "; ".join(notes))
    share = sum(w * w for w in works) / total**2
    own = math.log1p(math.expm1(spread**2) * share)
    median = math.exp(mean + (spread**2 - own) / 2) * total / 3600
    if freedom is None:
        factor = ASSUMED_FACTOR
    else:
        from scipy.stats import t  # slow to import, and a plan without measurements needs none

        deviation = math.sqrt(own + spread**2 / len(logs))
        factor = math.exp(float(t.ppf((1 + INTERVAL) / 2, freedom)) * deviation)
    return KindForecast(
        kind, len(planned), len(logs), median / factor, median, median * factor, "; ".join(notes)
    )


def _pooled_spread(measured: Sequence[Measurement]) -> tuple[float, int] | None:
    """Deviation within kinds of one size and its degrees of freedom; none where all stand alone."""
    groups: list[list[Measurement]] = []
    for m in measured:
        if m.node_seconds <= 0:
            continue
        for group in groups:
            if group[0].kind == m.kind and _same(group[0].size, m.size):
                group.append(m)
                break
        else:
            groups.append([m])
    squares, freedom = 0.0, 0
    for group in groups:
        logs = [math.log(m.node_seconds / m.work) for m in group]
        squares += statistics.pvariance(logs) * len(logs)
        freedom += len(logs) - 1
    return (math.sqrt(squares / freedom), freedom) if freedom else None


def normal_quantile() -> float:
    """Upper end of the central interval of a standard normal."""
    return statistics.NormalDist().inv_cdf((1 + INTERVAL) / 2)


def training_parameters(shape: dict[str, int], *, vocabulary: int, longest_block: int) -> int:
    """Parameters of a model that is trained from scratch, before it exists.

    Args:
        shape: d_model, layers, heads, kv_heads, d_ff (`abf.model.config.ShapeConfig`).
        vocabulary: V.
        longest_block: S; the length head has an output for 0 to S slots.
    """
    width, head = shape["d_model"], shape["d_model"] // shape["heads"]
    attention = 2 * width * width + 2 * width * head * shape["kv_heads"]
    layer = attention + 3 * width * shape["d_ff"] + 2 * width
    outside = vocabulary * width + width + width + (width + 1) * (1 + longest_block)
    return shape["layers"] * layer + outside
