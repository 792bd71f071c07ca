"""The score stage: one tidy file, its parts, and one contract for every task kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from abf.artifacts import DOCUMENT_SCORES, SCORES, read_table
from abf.base import build
from abf.checked import members
from abf.eval.config import GENERATIVE_KINDS, LikelihoodTask, ScoringConfig, Task
from abf.eval.score import score
from abf.train.config import ArObjective, BlockObjective, Objective
from tests.eval.corpus import Corpus, decode_stage
from tests.eval.test_continuation import DECODER, TASK

TASKS = {"heldout": LikelihoodTask(samples=2), "continue": TASK}


def scored(
    corpus: Corpus, out: Path, decodes: dict[str, Path], objective: Objective
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    counts = score(
        TASKS,
        {"threshold": DECODER, "again": DECODER},
        ScoringConfig(),
        run="run-1",
        arm="fixed",
        seed=2,
        objective=objective,
        model_dir=corpus.model,
        base_dir=corpus.base,
        packed=corpus.packed,
        decodes=decodes,
        tokenizer=corpus.tokenizer / "tokenizer",
        out=out,
    )
    rows = read_table(out / "scores.parquet", SCORES).to_pylist()
    parts = read_table(out / "documents.parquet", DOCUMENT_SCORES).to_pylist()
    assert counts == {"scores": len(rows), "parts": len(parts)}
    return rows, parts


@pytest.fixture(scope="module")
def decodes(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("decodes")
    names = ("continue.threshold", "continue.again")
    return {name: decode_stage(corpus, root / name, TASK, DECODER) for name in names}


def test_every_figure_follows_from_its_parts(
    corpus: Corpus, decodes: dict[str, Path], tmp_path: Path
) -> None:
    rows, parts = scored(corpus, tmp_path, decodes, BlockObjective())
    keys = [(r["task"], r["decoder"], r["metric"]) for r in rows]
    assert len(keys) == len(set(keys))
    for row in rows:
        assert (row["run"], row["arm"], row["seed"], row["task_version"]) == (
            "run-1", "fixed", 2, 3 if row["task"] == "heldout" else 2
        )  # fmt: skip
        mine = [p for p in parts if all(p[n] == row[n] for n in ("task", "decoder", "metric"))]
        if row["interval"] == "none":
            assert row["ci_low"] is None
            assert mine == []
            continue
        above, below = (sum(p[n] for p in mine) for n in ("numerator", "denominator"))
        assert row["value"] == pytest.approx(above / below)
        assert row["ci_low"] <= row["value"] <= row["ci_high"]
        assert row["n"] == len(mine)
    unmeasured = [r for r in rows if r["value"] is None]
    assert all(r["note"].startswith("not measured") for r in unmeasured)
    heldout = {r["metric"]: r["value"] for r in rows if r["task"] == "heldout"}
    assert heldout["bound_bits_per_byte"] < heldout["bound_with_boundary_bits_per_byte"]


def test_the_same_decode_scores_the_same(
    corpus: Corpus, decodes: dict[str, Path], tmp_path: Path
) -> None:
    rows, _ = scored(corpus, tmp_path, decodes, BlockObjective())
    one, two = (
        {r["metric"]: r["value"] for r in rows if r["decoder"] == name}
        for name in ("threshold", "again")
    )
    clock = {"tokens_per_second", "joules_per_token"}
    assert {k: v for k, v in one.items() if k not in clock} == {
        k: v for k, v in two.items() if k not in clock
    }


def test_an_ar_arm_has_no_block_figures(
    corpus: Corpus, decodes: dict[str, Path], tmp_path: Path
) -> None:
    rows, _ = scored(corpus, tmp_path, decodes, ArObjective())
    metrics = {r["metric"] for r in rows if r["task"] == "heldout"}
    assert metrics == {"ar_bits_per_byte", "base_bits_per_byte"}


@pytest.mark.parametrize("cls", members(Task), ids=lambda cls: cls.__name__)
def test_contract_of_every_task_kind(cls: type) -> None:
    cfg = cls()
    task = build(cfg)
    assert isinstance(task.version, int)
    assert callable(task.measure)
    assert (cfg.kind in GENERATIVE_KINDS) == hasattr(cfg, "new_tokens")
    if cfg.kind in GENERATIVE_KINDS:
        assert (cfg.prompt_tokens is None) != (cfg.prompt_lines is None)
