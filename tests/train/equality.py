"""What must be equal between two runs that differ only in how often they were stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from abf.track.journal import read_journal
from abf.train import checkpoint
from abf.train.checkpoint import Checkpoint

CLOCKS = ("tokens_per_s", "flops_per_s", "mfu", "peak_memory_gb", "peak_gpu_memory_gb")
"""Metrics that tell of the machine, not of the training."""


def read(found: Checkpoint) -> dict[str, Tensor]:
    """Every tensor of a checkpoint, whole, put together from its files by their headers alone."""
    tensors: dict[str, Any] = {}
    for file in sorted(found.path.glob("*.safetensors")):
        with safe_open(file, "pt") as opened:
            places = json.loads(opened.metadata()["DCP_SHARDING_INFO"])
            for name in opened.keys():  # noqa: SIM118, no mapping
                part, at = opened.get_tensor(name), places[name]["saved_offsets"]
                ends = [a + n for a, n in zip(at, part.shape, strict=True)]
                known = tensors.get(name, part.new_empty(ends))
                size = [max(a, b) for a, b in zip(ends, known.shape, strict=True)]
                grown = part.new_full(size, float("nan"))
                grown[tuple(slice(n) for n in known.shape)] = known
                grown[tuple(slice(a, b) for a, b in zip(at, ends, strict=True))] = part
                tensors[name] = grown
    return tensors


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
    before, after = read(one), read(two)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert curve(first) == curve(second)
