"""Intervals and p-values against tabulated t quantiles, closed forms and enumeration."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from abf.report.intervals import ERROR, PLAIN, RATE, SHARE, holm, seed_interval, t_test
from abf.report.metrics import BOUND, JOULES, NOISE, SPEED, scale_of

T = {(0.9, 2): 2.919986, (0.95, 1): 12.706205, (0.95, 2): 4.302653, (0.95, 4): 2.776445}
"""Student's t, two-sided: (coverage, degrees of freedom) -> quantile, from a printed table."""


@pytest.mark.parametrize(("confidence", "degrees"), T)
def test_interval_over_seeds_has_the_tabulated_half_width(confidence: float, degrees: int):
    values = [1.0, 2.5, 2.0, 4.0, 3.0][: degrees + 1]
    mean = sum(values) / len(values)
    variance = sum((v - mean) ** 2 for v in values) / degrees
    half = T[confidence, degrees] * math.sqrt(variance / len(values))
    found = seed_interval(values, confidence)
    assert found == pytest.approx((mean - half, mean + half), abs=1e-6 * half)


def test_one_seed_has_no_interval():
    assert seed_interval([1.0], 0.95) is None
    assert seed_interval([1.0, 1.0], 0.95) == (1.0, 1.0)


def test_a_rate_is_averaged_and_bounded_on_the_log_scale():
    values = [100.0, 200.0, 400.0]  # logs are ln 2 apart: their standard deviation is ln 2
    assert float(RATE.mean(values)) == pytest.approx(200)
    factor = 2 ** (T[0.95, 2] / math.sqrt(3))
    found = seed_interval(values, 0.95, RATE)
    assert found == pytest.approx((200 / factor, 200 * factor), rel=1e-6)
    plain = seed_interval(values, 0.95)
    assert plain is not None
    assert plain.low < 0 < found.low  # type: ignore[union-attr]


def test_a_rate_does_not_depend_on_its_unit():
    values = [3.0, 7.0, 5.0]
    found = seed_interval([1e3 * v for v in values], 0.9, RATE)
    assert found == pytest.approx([1e3 * end for end in seed_interval(values, 0.9, RATE) or ()])


def test_a_rate_of_zero_has_no_interval():
    assert float(RATE.mean([0.0, 5.0])) == 0
    assert seed_interval([0.0, 5.0], 0.95, RATE) is None


def test_a_share_stays_a_share():
    found = seed_interval([0.0, 0.1, 0.9], 0.95, SHARE)
    assert found == (0.0, 1.0)
    assert seed_interval([0.4, 0.5, 0.6], 0.95, SHARE) == seed_interval([0.4, 0.5, 0.6], 0.95)


def test_errors_pool_as_variances():
    assert float(ERROR.mean([3.0, 4.0])) == pytest.approx(math.sqrt((9 + 16) / 2))
    found = seed_interval([0.001, 0.02], 0.95, ERROR)
    assert found is not None
    assert found.low == 0


def test_which_metric_is_averaged_how():
    assert scale_of(SPEED, "tokens/s") is RATE
    assert scale_of(JOULES, "J/token") is RATE
    assert scale_of("finished_share", "share") is SHARE
    assert scale_of(NOISE, "bits/byte") is ERROR
    assert scale_of(BOUND, "bits/byte") is PLAIN


@pytest.mark.parametrize(("confidence", "degrees"), T)
def test_p_of_a_tabulated_quantile(confidence: float, degrees: int):
    quantile = T[confidence, degrees]
    assert t_test(0.3 * quantile, 0.3, degrees) == pytest.approx(1 - confidence, rel=1e-5)
    assert t_test(-0.3 * quantile, 0.3, degrees) == pytest.approx(1 - confidence, rel=1e-5)


def test_p_without_spread():
    assert t_test(0.0, 0.0, 2) == 1
    assert t_test(0.1, 0.0, 2) == 0


def closed_testing(p: list[float]) -> list[float]:
    """Adjusted p by Bonferroni tests of every intersection of hypotheses: what Holm shortens."""
    subsets = [s for n in range(1, len(p) + 1) for s in itertools.combinations(range(len(p)), n)]
    return [
        max(min(1.0, len(s) * min(p[j] for j in s)) for s in subsets if i in s)
        for i in range(len(p))
    ]


def test_holm_is_closed_testing_with_bonferroni():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    rng = np.random.default_rng(4)
    for size in (1, 2, 5, 7):
        p = (rng.random(size) ** 3).tolist()
        assert holm(p) == pytest.approx(closed_testing(p))
    assert holm([0.02, 0.02]) == pytest.approx([0.04, 0.04])
    assert holm([]) == []
