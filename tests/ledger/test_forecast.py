"""Forecasts against closed forms, tables of Student's t, and simulated studies."""

from __future__ import annotations

import math
import random
import statistics

import pytest

from abf.ledger.forecast import (
    Forecast,
    Measurement,
    Planned,
    forecast,
    training_parameters,
)
from abf.model.config import ShapeConfig
from abf.model.store import new_model

T95 = 2.920
"""95 % point of Student's t with 2 degrees of freedom, from printed tables."""


def test_one_directory_like_those_measured():
    seconds = [3600.0, 4000.0, 4400.0]
    logs = [math.log(s) for s in seconds]
    found = forecast([Planned("decode/x", "decode")], [Measurement("decode", s) for s in seconds])
    middle = math.exp(statistics.fmean(logs)) / 3600
    factor = math.exp(T95 * statistics.stdev(logs) * math.sqrt(1 + 1 / 3))
    assert found.median_node_hours == pytest.approx(middle)
    assert found.high_node_hours == pytest.approx(middle * factor, rel=1e-3)
    assert found.low_node_hours == pytest.approx(middle / factor, rel=1e-3)
    assert found.kinds[0].measurements == 3
    assert found.kinds[0].note == ""


def test_training_is_charged_by_token_and_parameter():
    size, rate = 1e6, 2e-9  # node-seconds a token and parameter
    measured = [Measurement("train block", rate * 1e8 * size, 1e8 * size, size) for _ in range(2)]
    same = forecast([Planned("train/a", "train block", 3e8 * size, size)], measured)
    assert same.median_node_hours == pytest.approx(rate * 3e8 * size / 3600)
    assert same.kinds[0].note == ""
    # Never seen at this size: scaled, and said.
    larger = forecast([Planned("train/b", "train block", 1e8 * 8e6, 8e6)], measured)
    assert larger.median_node_hours == pytest.approx(rate * 1e8 * 8e6 / 3600)
    assert larger.kinds[0].note == "scaled from models of 1e+06 to 1e+06 parameters"


def test_the_interval_holds_what_it_promises():
    """Of many simulated studies nine in ten cost what their forecast's interval says."""
    draw = random.Random(0)
    inside = 0
    for _ in range(600):
        mean, spread = draw.uniform(5, 9), draw.uniform(0.1, 0.5)
        measured = [Measurement("score", draw.lognormvariate(mean, spread)) for _ in range(4)]
        found = forecast([Planned(f"score/{i}", "score") for i in range(20)], measured)
        cost = sum(draw.lognormvariate(mean, spread) for _ in range(20)) / 3600
        inside += found.low_node_hours <= cost <= found.high_node_hours
    assert 0.86 <= inside / 600 <= 0.95


def test_without_a_measurement_there_is_no_figure():
    piece = Planned("train/a", "train block", 1e12, 1e6)
    found = forecast([piece], [Measurement("train ar", 100.0, 1e12, 1e6)])
    assert found == Forecast((), (piece,))
    assert found.high_node_hours == 0
    # A model of unknown size cannot be scaled to.
    unknown = Planned("train/b", "train ar", 1e6, None)
    assert forecast([unknown], [Measurement("train ar", 100.0, 1e12, 1e6)]).unmeasured == (unknown,)


def test_what_was_measured_once_says_where_its_interval_comes_from():
    pieces = [Planned("score/a", "score")]
    alone = forecast(pieces, [Measurement("score", 7200.0)])
    assert (alone.low_node_hours, alone.high_node_hours) == (pytest.approx(1), pytest.approx(4))
    assert alone.kinds[0].note == "measured once: a factor of 2 either way is assumed"
    others = [Measurement("decode", s) for s in (100.0, 110.0, 121.0)]
    pooled = forecast(pieces, [Measurement("score", 7200.0), *others])
    assert pooled.kinds[0].note == "measured once: the spread is that of the other kinds"
    factor = math.exp(T95 * math.log(1.1) * math.sqrt(2))
    assert pooled.high_node_hours == pytest.approx(2 * factor, rel=1e-3)


def test_a_job_in_the_queue_is_not_counted_twice():
    measured = [Measurement("score", 3600.0), Measurement("score", 3600.0)]
    pieces = [
        Planned("score/a", "score"),
        Planned("score/b", "score", committed_node_hours=0.25),
        Planned("score/c", "score", committed_node_hours=5.0),
    ]
    found = forecast(pieces, measured)
    assert found.median_node_hours == pytest.approx(1.75, rel=1e-2)
    assert found.kinds[0].directories == 3


def test_ends_of_kinds_are_added():
    measured = [Measurement("score", 100.0), Measurement("decode", 900.0)]
    found = forecast([Planned("score/a", "score"), Planned("decode/a", "decode")], measured)
    assert found.high_node_hours == pytest.approx(2000 / 3600)


@pytest.mark.parametrize(
    "shape", [ShapeConfig(), ShapeConfig(d_model=48, layers=2, heads=3, kv_heads=1, d_ff=96)]
)
def test_parameters_are_those_of_the_model(shape: ShapeConfig):
    model = new_model(shape, vocab_size=300, document_id=0, max_block=16, max_positions=64, seed=0)
    count = sum(p.numel() for p in model.parameters())
    assert training_parameters(shape.model_dump(), vocabulary=300, longest_block=16) == count
