"""Block diffusion against AR and against a dense trainer in clean tokens a second, and the journal.

All run the trainer's own step function (`abf.train.step.Trainer.step`: rows, noise, loss,
gradients, clipping, AdamW) on the same rows, interleaved in one process on one thread; times are
CPU seconds, so that a busy neighbour does not count. Letters: V vocabulary, L row length.
"""

from __future__ import annotations

import itertools
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from abf.artifacts import packed_schema
from abf.diffusion.config import LossConfig
from abf.hardware import bf16_instructions
from abf.model.config import ModelConfig
from abf.model.transformer import Transformer
from abf.train.config import ArObjective, BlockObjective, Objective, TrainConfig
from abf.train.record import Recorder
from abf.train.runtime import settings
from abf.train.step import StepResult, Trainer
from benchmarks.dense import DenseLosses
from benchmarks.statistics import Row, ratio_row

MEAN_BLOCK, MAX_BLOCK = 24, 64
DOCUMENT_LOG = (5.0, 0.75)
"""Mean and deviation of the log of a document's length: quartiles near 90, 148 and 246 tokens (the
demo's packed pieces: 103, 148 and 220)."""
MASKS = BlockObjective(loss=LossConfig(ar_weight=0))
OBJECTIVES: dict[str, Objective] = {
    "ar": ArObjective(),
    "block": BlockObjective(),
    "masks": MASKS,
    "dense": MASKS,
}
"""What is trained side by side: the AR model, blocks with their AR loss, blocks alone, and those
with a dense mask and full logits (`benchmarks.dense`)."""
WARM = 5
"""Steps before the measured ones: they compile kernels, make AdamW's state, and take most of the
memory that a run will hold (in the third step 0.2 s of 2.6 still go into first touches of it)."""
RECORDS = 200
"""Journal records a round; one takes microseconds."""


@dataclass(frozen=True)
class Case:
    """A shape, and how it is trained."""

    name: str
    model: ModelConfig
    row_length: int
    batch_rows: int
    precision: str

    def train(self, objective: Objective) -> TrainConfig:
        """Settings of the trainer; the loss weights are the defaults."""
        return TrainConfig.model_validate(
            {
                "objective": objective.model_dump(),
                "batch_rows": self.batch_rows,
                "precision": self.precision,
                "tokens": 10**9,
            }
        )


def _shape(vocabulary: int, width: int, layers: int, heads: int, kv: int, d_ff: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=vocabulary,
        d_model=width,
        layers=layers,
        heads=heads,
        kv_heads=kv,
        head_dim=width // heads,
        d_ff=d_ff,
        max_block=MAX_BLOCK,
    )


def cases(quick: bool) -> list[Case]:
    """Shapes to measure."""
    best = "bf16" if bf16_instructions() else "fp32"
    demo = _shape(4096, 128, 4, 4, 2, 384)
    cases = [
        Case("30M", _shape(8192, 512, 8, 8, 8, 1408), 1024, 2, best),
        Case("1.3M", demo, 512, 2, "fp32"),
    ]
    if best == "bf16":
        cases.append(Case("1.3M", demo, 512, 2, best))
    return [Case("quick", _shape(256, 64, 2, 2, 2, 128), 128, 2, best)] if quick else cases


def write_rows(path: Path, *, vocabulary: int, length: int, rows: int = 16) -> None:
    """Random tokens; documents of log-normal and blocks of geometric length, as in the demo."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, vocabulary, (rows, length), dtype=np.uint32)
    blocks, documents = np.zeros((2, rows, length), dtype=np.int32)
    document = 0
    for row in range(rows):
        start = block = 0
        while start < length:
            end = min(length, start + max(2, round(rng.lognormal(*DOCUMENT_LOG))))
            tokens[row, start] = 0
            documents[row, start:end] = document
            blocks[row, start] = block
            at = start + 1
            while at < end:
                block += 1
                size = int(np.clip(rng.geometric(1 / MEAN_BLOCK), 1, MAX_BLOCK))
                blocks[row, at : min(at + size, end)] = block
                at += size
            start, block, document = end, block + 1, document + 1
    metadata = {
        "row_length": length,
        "max_block": MAX_BLOCK,
        "vocab_size": vocabulary,
        "document_id": 0,
    }
    schema = packed_schema(length, {name: str(value) for name, value in metadata.items()})
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), length)
        for values in (tokens, blocks, documents)
    ]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(pa.table(columns, schema=schema))


def _rate_row(figure: str, tokens: int, seconds: Sequence[float], detail: str) -> Row:
    times = np.asarray(seconds)
    picks = np.random.default_rng(0).integers(len(times), size=(2000, len(times)))
    low, high = np.quantile(tokens / np.median(times[picks], axis=1), [0.025, 0.975])
    return Row(
        figure=figure,
        value=float(tokens / np.median(times)),
        low=float(low),
        high=float(high),
        unit="clean tokens/s",
        detail=detail,
    )


def _journal_seconds(recorder: Recorder, result: StepResult, tokens: int, first: int) -> float:
    """Wall seconds of recording one step with all its metrics (log_steps = 1)."""
    began = time.perf_counter()
    for step in range(first, first + RECORDS):
        recorder.step(result, tokens=tokens)
        recorder.metrics(step=step, tokens=step * tokens, wall_s=0.0, values={"lr": result.lr})
    return (time.perf_counter() - began) / RECORDS


def _run_case(case: Case, rounds: int, folder: Path) -> list[Row]:
    packed = folder / f"{case.name}.arrow"
    write_rows(packed, vocabulary=case.model.vocab_size, length=case.row_length)
    trainers: dict[str, Trainer] = {}
    for name, objective in OBJECTIVES.items():
        model = Transformer(case.model)
        model.initialise(torch.Generator().manual_seed(0))
        trainers[name] = Trainer(case.train(objective), seed=0, model=model, packed=packed)
    dense = trainers["dense"]
    dense.losses = DenseLosses(dense.model, dense.cfg, dense.loss)
    tokens = trainers["ar"].tokens_per_step
    seconds: dict[str, list[float]] = {name: [] for name in OBJECTIVES}
    journal: list[float] = []
    with Recorder(folder / f"{case.name}-{case.precision}", "bench", active=True) as recorder:
        first = {name: trainer.step(0).loss for name, trainer in trainers.items()}
        assert math.isclose(first["masks"], first["dense"], rel_tol=2e-3), first
        for number, trainer in itertools.product(range(1, WARM), trainers.values()):
            trainer.step(number)
        for number in range(WARM, WARM + rounds):
            results = {}
            for kind, trainer in trainers.items():
                began = time.process_time()
                results[kind] = trainer.step(number)
                seconds[kind].append(time.process_time() - began)
            begin = number * RECORDS
            journal.append(_journal_seconds(recorder, results["block"], tokens, begin))
    parameters = trainers["ar"].optimiser.gradients.numel()
    shape = case.model
    detail = (
        f"{parameters / 1e6:.1f}M parameters (d {shape.d_model}, {shape.layers} layers, d_ff "
        f"{shape.d_ff}, V {shape.vocab_size}), L {case.row_length}, {case.batch_rows} rows a step, "
        f"documents of median 148, blocks of mean {MEAN_BLOCK} tokens, {case.precision}, 1 thread"
    )
    name = f"{case.name} {case.precision}"
    return [
        ratio_row(
            f"training speed, block / AR, {name}",
            seconds["ar"],
            seconds["block"],
            f"{detail}; goal at least 0.5",
        ),
        ratio_row(
            f"training speed, masks alone / AR, {name}",
            seconds["ar"],
            seconds["masks"],
            f"{detail}, without the AR loss: logits on masked rows only; goal at least 0.58",
        ),
        ratio_row(
            f"training speed, masks alone / dense, {name}",
            seconds["dense"],
            seconds["masks"],
            f"{detail}; the same loss with a dense mask and full logits; goal at least 1.6",
        ),
        _rate_row(f"training, AR, {name}", tokens, seconds["ar"], detail),
        _rate_row(f"training, block, {name}", tokens, seconds["block"], detail),
        _rate_row(f"training, masks alone, {name}", tokens, seconds["masks"], detail),
        _rate_row(f"training, dense, {name}", tokens, seconds["dense"], detail),
        ratio_row(
            f"journal of every step / AR step, {name}",
            journal,
            seconds["ar"],
            f"{detail}; goal at most 0.01 at 30M",
        ),
    ]


def run(quick: bool = False) -> list[Row]:
    """Rows of the benchmark table."""
    rounds = 3 if quick else 15
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name, settings(threads=1):
        for case in cases(quick):
            rows += _run_case(case, rounds, Path(name))
    return rows
