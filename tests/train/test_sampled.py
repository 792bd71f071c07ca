"""A training whose system is sampled is bit for bit the training that is not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from abf.errors import Interrupted
from abf.track.journal import metrics_table, read_journal
from abf.track.system import system_samples
from abf.train.loop import TrainResult
from tests.train.equality import assert_same_run
from tests.train.tiny_run import tiny_train


def test_curve_and_weights_over_a_stop(
    tmp_path: Path,
    whole_run: tuple[Path, TrainResult],
    stop_at: Callable[..., Interrupted],
) -> None:
    with system_samples(tmp_path, interval=0.0005):
        stop_at(5, tmp_path)
    with system_samples(tmp_path, interval=0.0005):
        tiny_train(tmp_path)
    assert len(read_journal(tmp_path / "system.jsonl")) > 2
    assert_same_run(whole_run[0], tmp_path)
    names = metrics_table(tmp_path / "journal.jsonl").column("name").unique().to_pylist()
    before = metrics_table(whole_run[0] / "journal.jsonl").column("name").unique().to_pylist()
    assert names == before
