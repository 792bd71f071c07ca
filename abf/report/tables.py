"""Scores of single cells -> estimates of arms, with two intervals that are never mixed up.

The interval over seeds (Student's t, n = seeds) says how far another training run may land; the
interval over documents (bootstrap, the same resampled documents for every seed and arm) says how
far another held-out text may move the figure. Noise is drawn for every document by itself, so the
second contains the Monte-Carlo error of a bound; the first does not, for all seeds share the noise.
Pure functions of dictionaries and arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from abf.report.intervals import ERROR, Interval, holm, percentiles, seed_interval, t_test
from abf.report.metrics import MetricText, describe, scale_of


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
        """Mean over seeds, on the scale of the metric."""
        values = list(self.values.values())
        return float(scale_of(self.key.metric, self.unit).mean(values)) if values else None

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
    p: float | None
    """Larger of the two-sided p over seeds and over documents: a difference must outlast both.
    None where one of them cannot be told."""
    p_adjusted: float | None = None
    """The same after Holm, for all differences that are looked at together."""

    def separated(self, confidence: float) -> bool:
        """Whether both intervals exclude 0 and the adjusted p is small enough."""
        both = (self.over_seeds, self.over_documents)
        return (
            all(interval is not None and interval.excludes_zero() for interval in both)
            and self.p_adjusted is not None
            and self.p_adjusted <= 1 - confidence
        )


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
        unit = members[0][1]["unit"]
        scale = scale_of(key.metric, unit)
        found[arm, key] = Estimate(
            arm=arm,
            key=key,
            unit=unit,
            values=values,
            over_seeds=seed_interval(list(values.values()), confidence, scale),
            over_documents=None
            if ratios is None
            else percentiles(scale.mean(ratios.draws, axis=1), confidence),
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
    """Every arm minus every arm before it, over the seeds and documents both have.

    The adjusted p-values are for all the differences that are returned.
    """
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
                mean = float(np.mean(gaps))
                mine = _parts_of(parts, arm, key, seeds)
                ratios = resampled_ratios(mine + _parts_of(parts, baseline, key, seeds), resamples)
                over_documents, p = None, None
                if ratios is not None:
                    half = len(mine)
                    draws = (ratios.draws[:, :half] - ratios.draws[:, half:]).mean(axis=1)
                    over_documents = percentiles(draws, confidence)
                    if len(gaps) > 1 and np.isfinite(draws).all():
                        seed_error = float(np.std(gaps, ddof=1)) / len(gaps) ** 0.5
                        p = max(
                            t_test(mean, seed_error, len(gaps) - 1),
                            t_test(mean, float(np.std(draws, ddof=1)), ratios.documents - 1),
                        )
                found.append(
                    Difference(
                        arm=arm,
                        baseline=baseline,
                        key=key,
                        unit=one.unit,
                        mean=mean,
                        seeds=len(seeds),
                        over_seeds=seed_interval(gaps, confidence),
                        over_documents=over_documents,
                        documents=0 if ratios is None else ratios.documents,
                        p=p,
                    )
                )
    tested = [gap.p for gap in found if gap.p is not None]
    adjusted = iter(holm(tested))
    return [gap if gap.p is None else replace(gap, p_adjusted=next(adjusted)) for gap in found]


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


def admit(
    found: Mapping[tuple[str, Key], Estimate], has_cost: Callable[[str], bool]
) -> tuple[dict[tuple[str, Key], Estimate], list[tuple[Estimate, str]]]:
    """Estimates that may enter the report, and those that may not with the reason.

    A figure enters with its seed count, an interval, its task version and its cost; a standard
    error needs no interval of its own. A figure that was not measured enters as such.
    """
    entered, left_out = {}, []
    for name, estimate in found.items():
        reason = ""
        is_error = scale_of(estimate.key.metric, estimate.unit) is ERROR
        bare = not (is_error or estimate.over_seeds or estimate.over_documents)
        if estimate.values and bare:
            reason = "no interval: one seed, and no parts by document"
        elif estimate.values and not has_cost(estimate.arm):
            reason = "no cost on record for this arm"
        if reason:
            left_out.append((estimate, reason))
        else:
            entered[name] = estimate
    return entered, left_out
