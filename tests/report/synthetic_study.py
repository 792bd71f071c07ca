"""A study with true schemas and drawn numbers: all that the report reads, without a model."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from abf.artifacts import (
    DOCUMENT_SCORES,
    DOCUMENTS,
    METRICS,
    PIECES,
    SAMPLES,
    SCORES,
    packed_schema,
    write_table,
)
from abf.data.config import TrainedTokenizer
from abf.data.tokenizer import TextTokenizer, load_tokenizer, make_tokenizer
from abf.decode.edits import Edits
from abf.decode.request import Prompt, RequestState
from abf.decode.trace import TraceWriter
from abf.ledger.build import build_ledger
from abf.report.config import ReportConfig
from abf.report.inputs import ReportCell, ReportPlan, SourceNote
from abf.report.metrics import (
    AR,
    BASE,
    BLOCK_LENGTH,
    BOUND,
    BOUND_CUTS,
    CUT_BITS,
    FLOPS,
    JOULES,
    NOISE,
    SPEED,
    TPF,
)
from abf.track.journal import Journal

ROW = 128
DOCUMENTS_SCORED = 40
SCORED = [f"wiki-leads-{i:04x}" for i in range(DOCUMENTS_SCORED)]
HELDOUT = [*SCORED, *(f"wiki-leads-{i:04x}" for i in range(90, 100)), "python-stdlib-00ff"]
BASE_LOSS = 3.25
UNITS = {
    AR: "bits/byte",
    BASE: "bits/byte",
    BOUND: "bits/byte",
    BOUND_CUTS: "bits/byte",
    TPF: "tokens/forward",
    FLOPS: "FLOP/token",
    SPEED: "tokens/s",
    JOULES: "J/token",
    "distinct_2": "share",
    "repeated_4": "share",
    "nfe": "forwards/request",
    NOISE: "bits/byte",
    CUT_BITS: "bits/block",
    BLOCK_LENGTH: "tokens",
}
LEVEL = {"fixed": 0.06, "random": 0.1, "sentence": 0.0}
HOSTILE = '</span><script>alert("x")</script> & <img src=http://evil.example/x.png>'


def text_of(name: str) -> str:
    """A module of the standard library: real text, on every machine."""
    return (Path(sysconfig.get_paths()["stdlib"]) / name).read_text(encoding="utf-8")


def make_study(
    root: Path,
    *,
    arms: Sequence[str] = ("fixed", "random", "sentence"),
    seeds: Sequence[int] = (0, 1, 2),
    decoders: Sequence[str] = ("ar", "threshold-0.9", "threshold-0.6"),
    config: ReportConfig | None = None,
    steps: int = 60,
) -> ReportPlan:
    """Write all stage directories below `root` and return the plan over them."""
    tokenizer = _tokenizer(root)
    cells = []
    base = root / "base" / "pretrained"
    _train_base(base)
    for arm in arms:
        pack = root / "pack" / f"{arm}-packed"
        _pack(pack, arm)
        for seed in seeds:
            run = f"{arm}-{seed}"
            rng = np.random.default_rng([*arm.encode(), seed])
            cell = ReportCell(
                arm=arm,
                seed=seed,
                run=run,
                train=root / "train" / run,
                score=root / "score" / run,
                pack=pack,
                base=base,
                decodes={
                    f"continuation.{name}": root / "decode" / run / f"continuation.{name}"
                    for name in decoders
                },
            )
            _train(cell, rng, steps)
            _score(cell, rng)
            for name, directory in cell.decodes.items():
                _decode(directory, name.partition(".")[2], tokenizer, rng)
            cells.append(cell)
    stages = _attempts(root, cells)
    build_ledger(root, stages, root / "ledger" / "all")
    return ReportPlan(
        study="tiny",
        created="2026-11-22 06:15 UTC",
        git_sha="0123456789abcdef0123456789abcdef01234567",
        cells=cells,
        ledger=root / "ledger" / "all",
        tokenizer=root / "tokenizer" / "bpe" / "tokenizer",
        sources=[
            SourceNote("Wikipedia leads", "CC-BY-SA-4.0", "Wikipedia contributors", 6100),
            SourceNote("Python standard library", "PSF-2.0", "Python Software Foundation"),
        ],
        tokens={"train": 1_234_567, "heldout": 65_432},
        facts={"Model": "1.0 M parameters, row length 128, blocks of at most 32 tokens"},
        config=config or ReportConfig(bootstrap=400, generations=2),
    )


def _tokenizer(root: Path) -> TextTokenizer:
    rows = [
        {"doc_id": name, "text": text_of(name), "source": "s", "licence": "l", "language": "en"}
        for name in ("argparse.py", "textwrap.py", "this.py")
    ]
    rows.append(rows[0] | {"doc_id": "hostile", "text": HOSTILE})
    path = root / "prepare" / "docs" / "documents" / "train-00000.parquet"
    write_table(path, pa.Table.from_pylist(rows, schema=DOCUMENTS), DOCUMENTS)
    out = root / "tokenizer" / "bpe"
    make_tokenizer(TrainedTokenizer(vocab_size=700), root / "prepare" / "docs", out)
    return load_tokenizer(out / "tokenizer")


def _pack(directory: Path, arm: str) -> None:
    rng = np.random.default_rng(len(arm))
    rows = 60
    block_id = np.full((rows, ROW), -1, dtype=np.int32)
    document_id = np.full((rows, ROW), -1, dtype=np.int32)
    for row in range(rows):
        end = ROW - int(rng.integers(0, 9))
        at = block = 0
        for piece in range(2):
            stop = end if piece else end // 2
            block_id[row, at], document_id[row, at:stop] = block, 2 * row + piece
            at, block = at + 1, block + 1
            while at < stop:
                length = 12 if arm == "fixed" else int(np.clip(rng.gamma(2.5, 5), 1, 32))
                block_id[row, at : min(at + length, stop)] = block
                at, block = min(at + length, stop), block + 1
    (directory / "packed").mkdir(parents=True)
    schema = packed_schema(ROW, {"row_length": str(ROW)})
    columns = [
        pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), ROW).cast(field.type)
        for field, values in zip(
            schema, (np.zeros_like(block_id).astype(np.uint32), block_id, document_id), strict=True
        )
    ]
    path = str(directory / "packed" / "train.arrow")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_batch(pa.RecordBatch.from_arrays(columns, schema=schema))

    pieces = [
        {"document_id": i, "doc_id": name, "part": part, "row": i, "start": 0, "n_tokens": 9}
        | {"n_bytes": 30, "n_blocks": 2}
        for i, name in enumerate(HELDOUT)
        for part in range(1 + i % 2)
    ]
    table = pa.Table.from_pylist(pieces, schema=PIECES)
    write_table(directory / "packed" / "heldout.pieces.parquet", table, PIECES)


def _train_base(directory: Path) -> None:
    with Journal(directory / "journal.jsonl") as journal:
        for step in range(1, 101):
            loss = 5.0 if step <= 90 else BASE_LOSS + (step - 95.5) / 100
            journal.metrics(step, 1000 * step, {"ar": loss, "lr": 3e-3 * (101 - step) / 100}, step)


def _train(cell: ReportCell, rng: np.random.Generator, steps: int) -> None:
    rows = []
    for step in range(1, steps + 1):
        fall = 4 * np.exp(-step / 12)
        for name, level in (("nelbo", 3.4), ("ar", 3.1), ("length", 2.2)):
            value = level + LEVEL.get(cell.arm, 0.0) + fall + rng.normal(0, 0.05)
            row = {"step": step * 10, "tokens": step * 40_960, "name": name, "wall_s": step * 1.5}
            rows.append(row | {"value": float(value)})
        rows.append(row | {"name": "lr", "value": 5e-4 * min(step / 3, 1)})
    path = cell.train / "metrics.parquet"
    write_table(path, pa.Table.from_pylist(rows, schema=METRICS), METRICS)


def _score(cell: ReportCell, rng: np.random.Generator) -> None:
    scores: list[dict[str, Any]] = []
    documents: list[dict[str, Any]] = []
    shift = LEVEL.get(cell.arm, 0.0) + rng.normal(0, 0.01)

    def add(task: str, decoder: str, metric: str, level: float, by_document: bool = True) -> None:
        size = np.random.default_rng(7).integers(200, 900, DOCUMENTS_SCORED)
        parts = size * (level + np.random.default_rng(8).normal(0, 0.25, DOCUMENTS_SCORED))
        if metric != BASE or decoder:  # every cell scores one and the same base
            parts += rng.normal(0, 2, DOCUMENTS_SCORED)
        value = parts.sum() / size.sum() if by_document else level
        scores.append(
            {
                "run": cell.run,
                "arm": cell.arm,
                "seed": cell.seed,
                "task": task,
                "task_version": 1,
                "decoder": decoder,
                "metric": metric,
                "unit": UNITS[metric],
                "value": None if metric == JOULES else float(value),
                "ci_low": None,
                "ci_high": None,
                "interval": "documents" if by_document else "none",
                "n": DOCUMENTS_SCORED,
                "note": "no energy meter on this machine" if metric == JOULES else "",
            }
        )
        if by_document and metric != JOULES:
            documents.extend(
                {
                    "task": task,
                    "decoder": decoder,
                    "metric": metric,
                    "document": SCORED[i],
                    "numerator": float(parts[i]),
                    "denominator": float(size[i]),
                }
                for i in range(DOCUMENTS_SCORED)
            )

    add("likelihood", "", AR, 2.30 + shift / 3)
    add("likelihood", "", BASE, 2.28)
    add("likelihood", "", BOUND, 2.42 + shift)
    add("likelihood", "", BOUND_CUTS, 2.61 + shift / 2)
    add("likelihood", "", CUT_BITS, 2.2 + shift)
    add("likelihood", "", BLOCK_LENGTH, 11.0)
    add("likelihood", "", NOISE, 0.0040 + 0.0030 * cell.seed, False)
    for index, name in enumerate(cell.decodes):
        decoder = name.partition(".")[2]
        add("continuation", decoder, TPF, 1.0 + 1.3 * index + shift)
        add("continuation", decoder, BASE, 1.5 + 0.35 * index + shift)
        add("continuation", decoder, "nfe", 64 / (1 + 1.3 * index))
        add("continuation", decoder, FLOPS, (2.1 + 8 * index) * 1e6)
        add("continuation", decoder, "distinct_2", 0.8 - 0.05 * index)
        add("continuation", decoder, "repeated_4", 0.1 + 0.02 * index)
        add("continuation", decoder, SPEED, 200.0 + 90 * index + rng.normal(0, 9), False)
        add("continuation", decoder, JOULES, 0.0, False)
    table = pa.Table.from_pylist(scores, schema=SCORES)
    write_table(cell.score / "scores.parquet", table, SCORES)
    table = pa.Table.from_pylist(documents, schema=DOCUMENT_SCORES)
    write_table(cell.score / "documents.parquet", table, DOCUMENT_SCORES)


def _decode(directory: Path, name: str, tokenizer: TextTokenizer, rng: np.random.Generator) -> None:
    """Requests driven through the engine's own request state, with drawn commits."""
    directory.mkdir(parents=True)
    texts = [text_of("argparse.py")[900:1300], HOSTILE + "\nand so on " * 20]
    header = {"mask_id": str(tokenizer.vocab_size), "document_id": str(tokenizer.document_id)}
    rows = []
    with TraceWriter(directory / "trace.arrows", header | {"requests": str(len(texts))}) as trace:
        for request, text in enumerate(texts):
            ids = tokenizer.spans([text])[0].ids
            prompt = Prompt(request, f"prompt-{request}", ids[:10])
            state = RequestState(prompt, 60, tokenizer.vocab_size, tokenizer.document_id, trace)
            state.context()
            rest = [*ids[10:69].tolist(), tokenizer.document_id][:60]
            while not state.ended:
                _block(state, rest[len(state.tokens) :], name, rng)
            trace.flush()
            sample = state.sample()
            rows.append(
                {
                    "request": request,
                    "prompt_id": prompt.prompt_id,
                    "prompt": tokenizer.decode(prompt.token_ids),
                    "text": tokenizer.decode(sample.token_ids),
                    "prompt_ids": sample.prompt_ids,
                    "token_ids": sample.token_ids,
                    "block_length": sample.block_length,
                    "nfe": sample.nfe,
                    "positions": sample.positions,
                    "finished": sample.finished,
                    "wall_s": 0.5,
                }
            )
    table = pa.Table.from_pylist(rows, schema=SAMPLES)
    write_table(directory / "samples.parquet", table, SAMPLES)


def _block(state: RequestState, target: list[int], name: str, rng: np.random.Generator) -> None:
    length = 1 if name == "ar" else int(rng.integers(4, 14))
    state.open(min(length, state.tokens_left))
    assert state.block is not None
    while len(masked := state.block.masked()):
        state.nfe += 1
        slots = (
            masked[:1] if name == "ar" else np.sort(rng.permutation(masked)[: rng.integers(1, 5)])
        )
        count = len(slots)
        edits = Edits(
            write=slots,
            tokens=np.array([target[slot] for slot in slots]),
            lock=slots,
            prob=rng.beta(4, 1.2, count).astype(np.float32),
            entropy=np.zeros(count, np.float32),
            bars={"FILL": 0.9},
        )
        state.apply(edits)
    state.block.forced = name.endswith("0.6") and state.blocks == 1
    live = state.block.live
    state.complete()
    state.nfe += 1
    state.written(np.log(rng.beta(4, 1.2, live)))


def _attempts(root: Path, cells: Sequence[ReportCell]) -> list[Path]:
    directories = [
        root / "tokenize" / "shared",
        cells[0].base,
        *dict.fromkeys(cell.pack for cell in cells),
    ]
    for cell in cells:
        directories += [cell.train, *cell.decodes.values(), cell.score]
    for number, directory in enumerate(directories):
        directory.mkdir(parents=True, exist_ok=True)
        states = ["FAILED", "COMPLETED"] if number % 5 == 3 else ["COMPLETED"]
        lines = []
        for attempt, state in enumerate(states, start=1):
            start = 1.7e9 + 1000 * number + 300 * attempt
            stage = directory.relative_to(root).parts[0]
            seconds = 250.0 if stage == "train" else 20.0
            record = {
                "attempt": attempt,
                "job_id": f"{4000 + number}.{attempt}",
                "host": "here",
                "pid": 1,
                "pid_start": start,
                "rule": stage,
                "run": directory.name,
                "cores": 1,
                "gpus": 0,
                "start": start,
                "state": "RUNNING",
            }
            reason = "loss is nan at step 3 <b>" if state == "FAILED" else ""
            end = {"state": state, "reason": reason, "end": start + seconds, "elapsed_s": seconds}
            lines += [record, record | end]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / "attempts.jsonl").write_text(text)
    return directories
