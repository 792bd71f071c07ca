"""What must be equal between two runs that differ only in how often they were stopped."""

from __future__ import annotations

from pathlib import Path

import torch

from abf.track.journal import read_journal
from abf.train import checkpoint

CLOCKS = ("tokens_per_s",)


def curve(run_dir: Path) -> list[tuple[int, int, dict[str, float]]]:
    """Step, tokens and metrics of every record, without what a clock measured."""
    return [
        (
            record["step"],
            record["tokens"],
            {name: value for name, value in record["values"].items() if name not in CLOCKS},
        )
        for record in read_journal(run_dir / "journal.jsonl")
        if record["kind"] == "metrics"
    ]


def events(run_dir: Path) -> list[str]:
    return [r["name"] for r in read_journal(run_dir / "journal.jsonl") if r["kind"] == "event"]


def assert_same_run(first: Path, second: Path) -> None:
    """Weights, optimiser state and curves of two finished runs are equal bit for bit."""
    one, two = checkpoint.latest(first)[0], checkpoint.latest(second)[0]
    assert one is not None
    assert two is not None
    assert one.step == two.step
    for before, after in ((one.model(), two.model()), (one.optimizer(), two.optimizer())):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)
    assert curve(first) == curve(second)
