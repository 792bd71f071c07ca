"""Scores of single cells -> estimates of arms, with two intervals that are never mixed up.

The interval over seeds (Student's t, n = seeds) says how far another training run may land; the
interval over documents (bootstrap, the same resampled documents for every seed and arm) says how
far another held-out text may move the figure. Pure functions of dictionaries and arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from abf.report.metrics import MetricText, describe


class Interval(NamedTuple):
    """Lower and upper end."""

    low: float
    high: float

    def excludes_zero(self) -> bool:
        """Whether 0 lies outside."""
        return self.low > 0 or self.high < 0


class Key(NamedTuple):
    """What is measured, whatever the arm."""

    task: str
    task_version: int
    decoder: str
    metric: str


@dataclass(frozen=True)
class Estimate:
    """One figure of one arm: mean over seeds of a metric."""

    arm: str
    key: Key
    unit: str
    values: Mapping[int, float]
    """Seed -> value; empty when it was not measured."""
    over_seeds: Interval | None
    """None for fewer than two seeds."""
    over_documents: Interval | None
    """None when the metric has no parts by document."""
    documents: int
    """Documents behind the interval over documents."""
    notes: tuple[str, ...]
    """What the scores say about it, for example why it was not measured."""

    @property
    def mean(self) -> float | None:
        """Mean over seeds."""
        return float(np.mean(list(self.values.values()))) if self.values else None

    @property
    def text(self) -> MetricText:
        """Name and direction for people."""
        return describe(self.key.metric, generated=bool(self.key.decoder))


@dataclass(frozen=True)
class Difference:
    """A metric of one arm minus the same of another, paired by seed and by document."""

    arm: str
    baseline: str
    key: Key
    unit: str
    mean: float
    seeds: int
    over_seeds: Interval | None
    over_documents: Interval | None
    documents: int

    @property
    def separated(self) -> bool:
        """Whether both intervals exist and exclude 0."""
        both = (self.over_seeds, self.over_documents)
        return all(interval is not None and interval.excludes_zero() for interval in both)


Parts = Mapping[str, tuple[float, float]]
"""Document -> (numerator, denominator) of a ratio metric."""


@dataclass(frozen=True)
class CellScores:
    """Scores and per-document parts of one cell, as read from its score stage."""

    arm: str
    seed: int
    scores: Sequence[Mapping[str, Any]]
    """Rows of the SCORES schema."""
    documents: Sequence[Mapping[str, Any]]
    """Rows of the DOCUMENT_SCORES schema."""


def estimates(
    cells: Sequence[CellScores], *, confidence: float, resamples: int
) -> dict[tuple[str, Key], Estimate]:
    """Estimates of every (arm, metric), arms and metrics in order of appearance."""
    rows: dict[tuple[str, Key], list[tuple[int, Mapping[str, Any]]]] = {}
    for cell in cells:
        for row in cell.scores:
            rows.setdefault((cell.arm, _key(row)), []).append((cell.seed, row))
    parts = document_parts(cells)
    found = {}
    for (arm, key), members in rows.items():
        values = {seed: row["value"] for seed, row in members if row["value"] is not None}
        ratios = resampled_ratios(_parts_of(parts, arm, key, values), resamples)
        found[arm, key] = Estimate(
            arm=arm,
            key=key,
            unit=members[0][1]["unit"],
            values=values,
            over_seeds=seed_interval(list(values.values()), confidence),
            over_documents=None
            if ratios is None
            else percentiles(ratios.draws.mean(axis=1), confidence),
            documents=0 if ratios is None else ratios.documents,
            notes=tuple(dict.fromkeys(row["note"] for _, row in members if row["note"])),
        )
    return found


def differences(
    cells: Sequence[CellScores],
    keys: Iterable[Key],
    *,
    confidence: float,
    resamples: int,
) -> list[Difference]:
    """Every arm minus every arm before it, over the seeds and documents both have."""
    known = estimates(cells, confidence=confidence, resamples=resamples)
    parts = document_parts(cells)
    arms = list(dict.fromkeys(cell.arm for cell in cells))
    found = []
    for key in keys:
        for j, arm in enumerate(arms):
            for baseline in arms[:j]:
                one, two = known.get((arm, key)), known.get((baseline, key))
                if one is None or two is None:
                    continue
                seeds = sorted(one.values.keys() & two.values.keys())
                if not seeds:
                    continue
                gaps = [one.values[seed] - two.values[seed] for seed in seeds]
                mine = _parts_of(parts, arm, key, seeds)
                ratios = resampled_ratios(mine + _parts_of(parts, baseline, key, seeds), resamples)
                over_documents = None
                if ratios is not None:
                    half = len(mine)
                    draws = ratios.draws[:, :half] - ratios.draws[:, half:]
                    over_documents = percentiles(draws.mean(axis=1), confidence)
                found.append(
                    Difference(
                        arm=arm,
                        baseline=baseline,
                        key=key,
                        unit=one.unit,
                        mean=float(np.mean(gaps)),
                        seeds=len(seeds),
                        over_seeds=seed_interval(gaps, confidence),
                        over_documents=over_documents,
                        documents=0 if ratios is None else ratios.documents,
                    )
                )
    return found


def _key(row: Mapping[str, Any]) -> Key:
    return Key(row["task"], row.get("task_version", 0), row["decoder"], row["metric"])


def document_parts(
    cells: Sequence[CellScores],
) -> dict[tuple[str, int, str, str, str], dict[str, tuple[float, float]]]:
    """(arm, seed, task, decoder, metric) -> parts by document."""
    parts: dict[tuple[str, int, str, str, str], dict[str, tuple[float, float]]] = {}
    for cell in cells:
        for row in cell.documents:
            name = (cell.arm, cell.seed, row["task"], row["decoder"], row["metric"])
            parts.setdefault(name, {})[row["document"]] = (row["numerator"], row["denominator"])
    return parts


def _parts_of(
    parts: Mapping[tuple[str, int, str, str, str], Parts], arm: str, key: Key, seeds: Iterable[int]
) -> list[Parts]:
    return [parts.get((arm, seed, key.task, key.decoder, key.metric), {}) for seed in seeds]


class Resampled(NamedTuple):
    """Ratios of resampled documents."""

    draws: NDArray[np.float64]
    """[resamples, members]."""
    documents: int
    """Documents that every member has."""


def resampled_ratios(members: Sequence[Parts], resamples: int) -> Resampled | None:
    """Ratio of sums for every member, over documents drawn with replacement.

    The same draws for every member, so that members can be subtracted or averaged. The generator is
    seeded by a constant: the same scores give the same intervals.

    Returns:
        None for fewer than two common documents.
    """
    if not members:
        return None
    names = sorted(set.intersection(*(set(member) for member in members)))
    if len(names) < 2:
        return None
    sums = np.array([[member[name] for name in names] for member in members])  # [members, n, 2]
    rng = np.random.default_rng(0)
    counts = rng.multinomial(len(names), np.full(len(names), 1 / len(names)), size=resamples)
    numerator, denominator = counts @ sums[:, :, 0].T, counts @ sums[:, :, 1].T
    with np.errstate(invalid="ignore", divide="ignore"):
        return Resampled(numerator / denominator, len(names))


def percentiles(draws: NDArray[np.float64], confidence: float) -> Interval | None:
    """Middle `confidence` of the draws; None if no draw has a denominator."""
    draws = draws[np.isfinite(draws)]
    if not len(draws):
        return None
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(float(low), float(high))


def seed_interval(values: Sequence[float], confidence: float) -> Interval | None:
    """Student's t interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t

    half = float(t.ppf((1 + confidence) / 2, len(values) - 1))
    half *= float(np.std(values, ddof=1)) / len(values) ** 0.5
    mean = float(np.mean(values))
    return Interval(mean - half, mean + half)


def admit(
    found: Mapping[tuple[str, Key], Estimate], has_cost: Callable[[str], bool]
) -> tuple[dict[tuple[str, Key], Estimate], list[tuple[Estimate, str]]]:
    """Estimates that may enter the report, and those that may not with the reason.

    A figure enters with its seed count, an interval, its task version and its cost. A figure that
    was not measured enters as such.
    """
    entered, left_out = {}, []
    for name, estimate in found.items():
        reason = ""
        if estimate.values and not (estimate.over_seeds or estimate.over_documents):
            reason = "no interval: one seed, and no parts by document"
        elif estimate.values and not has_cost(estimate.arm):
            reason = "no cost on record for this arm"
        if reason:
            left_out.append((estimate, reason))
        else:
            entered[name] = estimate
    return entered, left_out
