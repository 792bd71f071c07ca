"""Laws and weights of masks other than the default: which are the bound, and by how much not."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import integrate, special, stats

from abf.diffusion.config import BetaRate, CountLaw, MaskedCorruption, MaskLaw, UniformRate
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.corrupt.masked import count_law
from abf.diffusion.layout import predicted
from tests.diffusion.rows import V, make_batch
from tests.diffusion.test_estimators import bound, cross_entropy

CLIPS = [{"up_to": 2, "low": 0.5, "high": 1.0}, {"up_to": 4, "low": 0.3, "high": 0.8}]


def drawn(size: int, *, seeds: int = 500, **settings: Any) -> tuple[float, float]:
    """Mean weighted loss of a block over draws (all views of each), and its standard error."""
    cfg = MaskedCorruption.model_validate(settings)
    corrupter, row = build_corruption(cfg, mask_id=V), 1 + 4 * size
    batch, samples = make_batch([[[size] * 4]] * 8, row), []
    for epoch in range(seeds):
        views = [
            corrupter.apply(batch, seed=1, epochs=np.full(8, epoch), draw=view)
            for view in range(corrupter.views)
        ]
        for line in range(8):
            total = 0.0
            for one in views:
                for start in range(1, row, size):
                    mask = tuple(np.flatnonzero(one.masked[line, start : start + size]).tolist())
                    weight = one.weight[line, start : start + size]
                    total += sum(float(cross_entropy(mask, slot)) * weight[slot] for slot in mask)
            samples.append(total / 4)
    return float(np.mean(samples)), float(np.std(samples) / len(samples) ** 0.5)


@pytest.mark.parametrize("size", [1, 3, 5])
@pytest.mark.parametrize(
    "settings",
    [
        {"law": {"kind": "uniform"}, "weight": "rate"},
        {"law": {"kind": "uniform"}, "weight": "exact"},
        {"law": {"kind": "uniform", "low": 0.3, "high": 0.8}, "weight": "exact"},
        {"law": {"kind": "uniform", "by_length": CLIPS}, "weight": "exact"},
        {"law": {"kind": "beta", "mean": 0.6, "concentration": 4}, "weight": "exact"},
        {"law": {"kind": "beta", "mean": 0.6, "concentration": 4}, "pair": True},
        {"law": {"kind": "count"}, "pair": True},
        {"law": {"kind": "uniform"}, "pair": True, "shared": "document"},
        {"law": {"kind": "count"}, "shared": "document"},
    ],
    ids=str,
)
def test_these_are_the_bound(size: int, settings: dict[str, Any]) -> None:
    mean, error = drawn(size, **settings)
    assert abs(mean - float(bound(size))) < 4.5 * error + 1e-9
    assert MaskedCorruption.model_validate(settings).bound


@pytest.mark.parametrize("size", [1, 2, 4])
def test_dividing_by_the_realised_rate_misweighs_short_blocks(size: int) -> None:
    """SDAR-VL's EMRS on blocks of unequal length: S/(S+1) of the bound, a half for one token."""
    settings = {"law": {"kind": "uniform"}, "weight": "realised"}
    mean, error = drawn(size, **settings)
    assert abs(mean - float(bound(size) * Fraction(size, size + 1))) < 4.5 * error
    assert 4.5 * error < float(bound(size)) / (size + 1) / 2
    assert not MaskedCorruption.model_validate(settings).bound


@pytest.mark.parametrize(
    "settings",
    [
        {"law": {"kind": "uniform", "low": 0.3, "high": 0.8}, "weight": "rate"},
        {"law": {"kind": "uniform", "by_length": CLIPS}, "weight": "rate"},
        {"law": {"kind": "beta"}, "weight": "realised"},
        {"weight": "one"},
        {"weight": "one", "pair": True},
    ],
    ids=str,
)
def test_these_say_that_they_are_not(settings: dict[str, Any]) -> None:
    cfg = MaskedCorruption.model_validate(settings)
    assert not cfg.bound
    assert cfg.reported().bound


@pytest.mark.parametrize("size", [1, 2, 5, 9])
@pytest.mark.parametrize(
    ("law", "low", "high", "density"),
    [
        (UniformRate(), 0, 1, lambda t: 1.0),
        (UniformRate(low=0.3, high=0.8), 0.3, 0.8, lambda t: 2.0),
        (BetaRate(mean=0.7, concentration=5), 0, 1, lambda t: stats.beta.pdf(t, 3.5, 1.5)),
    ],
)
def test_chances_of_counts_are_integrals(
    size: int, law: MaskLaw, low: float, high: float, density: Any
) -> None:
    for k, chance in enumerate(count_law(law, size)):
        wanted, _ = integrate.quad(
            lambda t, k=k: special.comb(size, k) * t**k * (1 - t) ** (size - k) * density(t),
            low, high,
        )  # fmt: skip
        assert chance == pytest.approx(wanted, abs=1e-7)
    assert count_law(law, size).sum() == pytest.approx(1)
    assert count_law(CountLaw(), size).tolist() == [0.0] + [1 / size] * size


def test_a_pair_supervises_every_token_once() -> None:
    batch = make_batch([[[3, 1, 5], [4, 4]]], 20)
    cfg = MaskedCorruption(law=UniformRate(), weight="one", pair=True)
    corrupter = build_corruption(cfg, mask_id=V)
    epochs = np.zeros(1, dtype=np.int64)
    for pair in range(5):
        first, second = (
            corrupter.apply(batch, seed=0, epochs=epochs, draw=2 * pair + view) for view in (0, 1)
        )
        assert (first.masked ^ second.masked)[predicted(batch)].all()
        assert not (first.masked & second.masked).any()
        assert (first.weight + second.weight == predicted(batch)).all()


def test_rates_stay_inside_their_clip() -> None:
    law = {"kind": "uniform", "low": 0.0, "high": 0.1, "by_length": CLIPS}
    cfg = MaskedCorruption.model_validate({"law": law, "weight": "one"})
    batch = make_batch([[[2] * 60, [4] * 60, [8] * 60]], 843)
    corrupter = build_corruption(cfg, mask_id=V)
    hidden = [corrupter.apply(batch, seed=0, epochs=np.array([e])).masked for e in range(9)]
    pieces = [predicted(batch) & (batch.document_id == piece) for piece in range(3)]
    shares = [np.mean([one[piece].mean() for one in hidden]) for piece in pieces]
    assert shares == pytest.approx([0.75, 0.55, 0.05], abs=0.05)


def test_a_document_has_one_rate_where_it_is_shared() -> None:
    """SDAR's; with weight 1/rate a document's masked tokens all weigh the same."""
    batch = make_batch([[[5] * 8, [5] * 8]], 82)
    weights: dict[str, list[int]] = {}
    for shared in ("document", "block"):
        cfg = MaskedCorruption(law=UniformRate(), weight="rate", shared=shared)
        noised = build_corruption(cfg, mask_id=V).apply(batch, seed=3, epochs=np.zeros(1, int))
        weights[shared] = [
            len(set(noised.weight[noised.masked & (batch.document_id == piece)]))
            for piece in (0, 1)
        ]
        assert len(set(noised.weight[noised.masked])) == sum(weights[shared])
    assert weights["document"] == [1, 1]
    assert min(weights["block"]) > 3


def test_a_pair_has_no_weight_by_rate() -> None:
    with pytest.raises(ValidationError, match="complementary"):
        MaskedCorruption(pair=True, weight="rate")
