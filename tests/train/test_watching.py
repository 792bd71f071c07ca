"""What the journal says of speed and blocks, against counts by hand and by torch's own counter.

Letters: V vocabulary, L row length, R rows read.
"""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from abf_kernels.block_attention.api import block_attention
from torch.utils.flop_counter import FlopCounterMode

from abf.cluster.config import LaunchConfig
from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig, MaskedCorruption, PathCorruption
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.flops import counting
from abf.diffusion.layout import block_lengths, block_starts, predicted
from abf.diffusion.loss import loss_terms
from abf.errors import ArtifactError
from abf.eval.flops import Passes, forward_flops
from abf.instance import LAUNCH
from abf.job import Job
from abf.model.store import with_edit_heads
from abf.track.journal import read_journal
from abf.track.mlflow_points import read_new_points
from abf.train.lengths import bin_names, count_lengths, shares
from abf.train.peak import SIDE, peak
from abf.train.record import Recorder
from abf.train.step import StepResult, Trainer
from tests.diffusion.rows import make_batch, tiny_model
from tests.train.tiny_run import V, new_model, tiny_config, tiny_train, write_rows

D, LAYERS, FF = 32, 2, 64
ATTENTION_OUT, MLP = 32 * 32, 3 * D * FF
LAYER = 32 * 32 + 2 * 32 * 16 + ATTENTION_OUT + MLP
"""Weights of the matrices of one layer of `new_model`."""


def pieces(batch: PackedBatch) -> list[int]:
    """Slots of every piece."""
    rows = (row[row >= 0] for row in batch.document_id)
    return [int(n) for row in rows for n in np.unique(row, return_counts=True)[1]]


def test_flops_of_an_ar_step_by_hand(tmp_path: Path) -> None:
    packed = write_rows(tmp_path)
    for micro_rows in (None, 1):
        cfg = tiny_config(objective={"kind": "ar"}, micro_rows=micro_rows)
        trainer = Trainer(cfg, seed=0, model=new_model(), packed=packed)
        batch = trainer.rows.rows(trainer.row_indices(0)[0])
        assert (batch.document_id < 0).any(), "padding, which must not count"
        sizes = pieces(batch)
        charged = sum(n - 1 for n in sizes)  # nothing depends on the last token of each
        forward = 2 * charged * (LAYERS * LAYER + V * D) + 4 * LAYERS * D * sum(
            n * (n - 1) // 2 for n in sizes
        )
        assert trainer.step(0).flops == 3 * forward


@pytest.mark.parametrize("kind", ["masked", "path"])
def test_products_of_a_block_pass_as_torch_counts_them(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Attention, of which torch would count whole squares, is counted pair by pair here."""
    batch = make_batch([[[3, 1, 8, 2], [4, 7]], [[5, 8], [1, 1, 2, 8]]], 27)
    assert (batch.document_id >= 0).all()
    model = tiny_model(dtype=torch.float32)
    corruption: Any = MaskedCorruption()
    if kind == "path":
        model, corruption = with_edit_heads(model), PathCorruption()
    noised = build_corruption(corruption, mask_id=model.mask_id).apply(
        batch, seed=0, epochs=np.zeros(2, dtype=np.int64)
    )
    pairs = 0

    def attend(q: Any, k: Any, v: Any, ranges: Any, **options: Any) -> Any:
        nonlocal pairs
        pairs += int((ranges[..., 1::2] - ranges[..., ::2]).sum())
        return block_attention(q, k, v, ranges, **options)

    monkeypatch.setattr("abf.model.attention.block_attention", attend)
    with torch.no_grad(), counting() as mine, FlopCounterMode(display=False) as theirs:
        terms = loss_terms(model, batch, noised=noised, loss=LossConfig(), backend="reference")
    found = theirs.get_flop_counts()["Global"]
    linear = sum(n for op, n in found.items() if str(op) in ("aten.mm", "aten.addmm"))
    config = model.config
    heads = 2 * terms["length"].count * config.d_model * (1 + config.max_block)
    if kind == "path":  # every slot and end of a block, read by the edit head
        blocks, widest = len(noised.path.slots), noised.path.text.shape[1]
        heads += 2 * blocks * (widest + 1) * config.d_model * model.edit_head.out_features

    width = config.heads * config.head_dim
    assert mine.flops == linear - heads + 4 * width * pairs


def test_gradients_cost_twice_as_much_again_and_nobody_counts_unasked() -> None:
    model = tiny_model(dtype=torch.float32)
    states = torch.ones(5, model.config.d_model)
    with counting() as both:
        model.logits(states)
    with counting() as alone, torch.no_grad():
        model.logits(states)
    assert alone.flops == 2 * 5 * model.head_weight.numel()
    assert both.flops == 3 * alone.flops
    model.logits(states)
    assert alone.flops == 2 * 5 * model.head_weight.numel()


def test_a_decode_is_counted_by_the_same_rule() -> None:
    model = new_model()
    passes = Passes(nfe=1, positions=7, pairs=19)
    wanted = 2 * 7 * (LAYERS * LAYER + V * D) + 4 * LAYERS * D * 19
    assert forward_flops(model, passes) == wanted


def test_utilisation_is_flops_over_seconds_and_peak(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = itertools.count(100.0, 0.25)  # a quarter of a second passes at each look at the clock
    monkeypatch.setattr(time, "monotonic", lambda: next(now))
    result = StepResult(1.0, {"ar": 2.0}, {"ar": 2}, 2, 0, {}, 600.0, 0.5, 0.1)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 7e9 + device.index)
    with Recorder(tmp_path, "watch", active=True, device=torch.device("cuda", 3)) as record:
        record.begin(step=0, steps=2, window={}, peak=8000.0)
        monkeypatch.setattr(record, "_seconds", lambda: 0.5)
        for _ in range(2):
            record.step(result, tokens=30)
        record.metrics(step=2, tokens=60, wall_s=1.0, values={})
    (values,) = (
        r["values"] for r in read_journal(tmp_path / "journal.jsonl") if r["kind"] == "metrics"
    )
    assert values["flops_per_s"] == 2400.0
    assert values["mfu"] == 0.3
    assert values["tokens_per_s"] == 120.0
    assert 0.05 < values["peak_memory_gb"] < 100
    assert values["peak_gpu_memory_gb"] == pytest.approx(7 + 3e-9, abs=1e-12)


def test_the_peak_is_the_fastest_product_or_what_was_given(monkeypatch: pytest.MonkeyPatch) -> None:
    assert peak("bf16", given_tflops=312).flops == 312e12
    assert peak("bf16", given_tflops=312).source == "given: launch.peak_tflops=312"
    # Begins at 0; products take 0.06 (from 0.01), then 0.02 (from 0.09); at 0.2 it is enough.
    looks = iter([0.0, 0.01, 0.07, 0.09, 0.11, 0.2])
    monkeypatch.setattr("abf.train.peak.time.perf_counter", lambda: next(looks))
    found = peak("fp32")
    assert found.flops == pytest.approx(2 * SIDE**3 / 0.02)
    assert found.source.startswith(f"measured: {SIDE} x {SIDE} matrix product, fp32, ")


def test_a_run_says_its_peak_and_its_utilisation(tmp_path: Path) -> None:
    tiny_train(tmp_path)
    start, *rest = read_journal(tmp_path / "journal.jsonl")
    assert start["peak_source"].startswith("measured: ")
    assert start["peak_flops"] > 1e8
    records = [r["values"] for r in rest if r["kind"] == "metrics"]
    for values in records:
        assert values["mfu"] == pytest.approx(values["flops_per_s"] / start["peak_flops"], rel=1e-2)
        assert 0 < values["mfu"] < 1


def test_what_the_site_says_of_its_devices_reaches_the_training(tmp_path: Path) -> None:
    job = Job(tmp_path, {}, tmp_path)
    assert job.launch() is None
    (tmp_path / LAUNCH).write_text(json.dumps({"peak_tflops": 312.0}))
    assert job.launch() == LaunchConfig(peak_tflops=312.0)
    (tmp_path / LAUNCH).write_text(json.dumps({"peak_tflops": -1}))
    with pytest.raises(ArtifactError, match=r"launch\.json is damaged \(peak_tflops: .*greater"):
        job.launch()


def test_bins_of_lengths() -> None:
    def names(longest: int) -> list[str]:
        return [name.removeprefix("block_length.") for name in bin_names(longest)]

    assert names(1) == ["1"]
    assert names(8) == ["1", "2", "3_4", "5_8"]
    assert names(12) == ["1", "2", "3_4", "5_8", "9_12"]
    assert names(64) == ["1", "2", "3_4", "5_8", "9_16", "17_32", "33_64"]
    assert names(9)[-1] == "9"
    batch = make_batch([[[1, 1, 2, 3, 4, 5], [8, 9]], [[12, 1], [2]]], 40)
    assert count_lengths(batch, 12).tolist() == [3, 2, 2, 2, 2]
    assert shares({"block_length.1": 3, "block_length.2": 1, "tokens": 5}) == {
        "block_length_1": 0.75, "block_length_2": 0.25, "block_length_mean": 1.25,
    }  # fmt: skip
    assert shares({"tokens": 5}) == {}


def test_the_journal_tells_the_blocks_that_were_trained_on(tmp_path: Path) -> None:
    """After caps and joins, every two steps, of all rows of those steps; and MLflow has it."""
    directory = tmp_path / "train" / "run"
    stages = [{"until": 0.4, "block_cap": 2}, {"until": 1, "join": 0.5}]
    objective = {"kind": "block", "stages": stages}
    tiny_train(directory, {"objective": objective})
    cfg = tiny_config(objective=objective)
    trainer = Trainer(cfg, seed=0, model=new_model(), packed=directory / "train.arrow")
    records = [r for r in read_journal(directory / "journal.jsonl") if r["kind"] == "metrics"]
    assert [r["step"] for r in records] == [2, 4, 6, 8, 10]
    for record in records:
        lengths: list[int] = []
        for number in (record["step"] - 2, record["step"] - 1):
            rows, epochs = trainer.row_indices(number)
            batch = trainer._grouped(number, trainer.rows.rows(rows), epochs)
            lengths += block_lengths(batch)[block_starts(batch)].tolist()
            assert sum(block_lengths(batch)[block_starts(batch)]) == predicted(batch).sum()
        values = record["values"]
        for name, low, high in (("1", 1, 1), ("2", 2, 2), ("3_4", 3, 4), ("5_8", 5, 8)):
            share = sum(low <= length <= high for length in lengths) / len(lengths)
            assert values[f"block_length_{name}"] == pytest.approx(share)
        assert values["block_length_mean"] == pytest.approx(np.mean(lengths))
    assert records[1]["values"]["block_length_3_4"] == 0 < records[2]["values"]["block_length_3_4"]
    points = read_new_points(directory / "journal.jsonl", offset=0, tail="").points
    names = {point.key for point in points}
    assert {
        "train/mfu",
        "train/flops_per_s",
        "train/peak_memory_gb",
        "train/block_length_5_8",
    } <= names
