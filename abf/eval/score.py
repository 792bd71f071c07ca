"""The score stage: every task of a run, figures with intervals, and the parts behind them.

Writes `scores.parquet` (SCORES, tidy) and `documents.parquet` (DOCUMENT_SCORES).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from abf.artifacts import DOCUMENT_SCORES, SCORES, write_table
from abf.base import build
from abf.decode.config import DecoderConfig
from abf.eval.base import Measure, Ratio, Subject
from abf.eval.base import Task as Scorer
from abf.eval.config import GENERATIVE_KINDS, ScoringConfig, Task
from abf.eval.intervals import bootstrap_ratio
from abf.train.config import Objective


def score(
    tasks: Mapping[str, Task],
    decoders: Mapping[str, DecoderConfig],
    scoring: ScoringConfig,
    *,
    run: str,
    arm: str,
    seed: int,
    objective: Objective,
    model_dir: Path,
    base_dir: Path,
    packed: Path,
    decodes: Mapping[str, Path],
    tokenizer: Path,
    out: Path,
    label: str = "score",
) -> dict[str, int | float | str]:
    """Score one run.

    Args:
        tasks: protocols by name.
        decoders: ways of generating by name; every generative task was decoded with each.
        scoring: threads and precision, the latter resolved.
        run, arm, seed: names of the run, for the rows.
        objective: what the model was trained for; an AR model has no block rows.
        model_dir: ABF model directory.
        base_dir: Hugging Face directory of the AR model it started from.
        packed: stage directory of `pack`.
        decodes: stage directories of `decode` by `{task}.{decoder}`.
        tokenizer: folder with tokenizer.json.
        out: staging directory.
        label: name on the progress line.

    Returns:
        Counts for the manifest.
    """
    torch.set_num_threads(scoring.threads)
    subject = Subject(
        model_dir=model_dir,
        base_dir=base_dir,
        packed=packed,
        tokenizer=tokenizer,
        objective=objective,
        precision=scoring.precision,
        label=label,
    )
    rows: list[dict[str, Any]] = []
    parts: list[dict[str, Any]] = []
    for name, cfg in tasks.items():
        task: Scorer = build(cfg)
        for decoder in decoders if cfg.kind in GENERATIVE_KINDS else [""]:
            decoded = decodes[f"{name}.{decoder}"] if decoder else None
            where = {"task": name, "decoder": decoder}
            known = {"run": run, "arm": arm, "seed": seed, "task_version": task.version} | where
            for measure in task.measure(subject, decoded):
                rows.append(known | _row(measure))
                parts += [where | part for part in _parts(measure)]
    write_table(out / "scores.parquet", pa.Table.from_pylist(rows, schema=SCORES), SCORES)
    write_table(
        out / "documents.parquet",
        pa.Table.from_pylist(parts, schema=DOCUMENT_SCORES),
        DOCUMENT_SCORES,
    )
    return {"scores": len(rows), "parts": len(parts)}


def _row(measure: Measure) -> dict[str, Any]:
    known = {"metric": measure.metric, "unit": measure.unit, "note": measure.note}
    if not isinstance(measure, Ratio):
        found = {"value": measure.value, "n": measure.n, "interval": "none"}
        return known | found | {"ci_low": None, "ci_high": None}
    interval = bootstrap_ratio(measure.numerator, measure.denominator)
    if interval.value is None:
        known["note"] = "not measured: nothing to divide by"
    return known | {
        "value": interval.value,
        "ci_low": interval.low,
        "ci_high": interval.high,
        "interval": "none" if interval.low is None else "documents",
        "n": len(measure.documents),
    }


def _parts(measure: Measure) -> list[dict[str, Any]]:
    if not isinstance(measure, Ratio):
        return []
    parts = zip(measure.documents, measure.numerator, measure.denominator, strict=True)
    return [
        {"metric": measure.metric, "document": name, "numerator": above, "denominator": below}
        for name, above, below in parts
    ]
