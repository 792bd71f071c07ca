"""Costs, block lengths, generations and number texts, each against a plain oracle."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from synthetic_study import BASE_LOSS, HELDOUT, HOSTILE, SCORED, make_study, text_of

from abf.artifacts import SAMPLES, packed_schema, write_table
from abf.data.tokenizer import load_tokenizer
from abf.decode.trace import read_trace
from abf.errors import ArtifactError
from abf.report import generations, text
from abf.report.bases import base_names, base_scores
from abf.report.blocks import block_lengths, read_block_lengths
from abf.report.costs import SHARED, costs, side_by_side, total
from abf.report.coverage import Share, coverage, heldout_documents
from abf.report.curves import training_of_bases, training_of_cells, training_panels
from abf.report.generations import END_MARK, fold_blocks, read_generations
from abf.report.inputs import ReportPlan
from abf.report.intervals import Interval
from abf.report.metrics import AR, BASE
from abf.report.tables import CellScores, Difference, Estimate, Key

# --- costs --------------------------------------------------------------------------------------


def ledger_row(rule: str, run: str, hours: float, **changes: Any) -> dict[str, Any]:
    return {
        "rule": rule,
        "run": run,
        "core_hours": hours,
        "node_hours": None,
        "state": "COMPLETED",
        "energy_j": None,
        "energy_source": "not measured",
        "elapsed_s": 3600 * hours,
        "job_id": f"{rule}-{run}",
    } | changes


def test_costs_by_arm_and_stage():
    ledger = [
        ledger_row("train", "a0", 1.0),
        ledger_row("train", "a1", 2.0, state="FAILED"),
        ledger_row("train", "b0", 4.0, energy_j=100.0, energy_source="rapl"),
        ledger_row("tokenize", "t", 0.5),
    ]
    owners = {("train", "a0"): "a", ("train", "a1"): "a", ("train", "b0"): "b"}
    found = costs(ledger, owners)
    assert [(c.arm, c.stage, c.core_hours, c.attempts, c.failed) for c in found] == [
        ("a", "train", 3.0, 2, 1),
        ("b", "train", 4.0, 1, 0),
        (SHARED, "tokenize", 0.5, 1, 0),
    ]
    assert [c.energy_text for c in found[:2]] == ["not measured", "100 J (rapl)"]
    assert total(found).core_hours == 7.5
    assert total(found).energy_text == "100 J (rapl, 1 of 4)"
    assert total(found, "a", "b").core_hours == 7.0
    assert total(found, "nobody").attempts == 0
    assert total(found).node_hours is None
    assert text.cost_text(total(found)) == "7.5 core-h"
    node = costs([ledger_row("train", "a0", 1.0, node_hours=0.25)], owners)
    assert text.cost_text(total(node)) == "0.25 node-h"


def test_jobs_that_ran_side_by_side():
    def at(second: float, rule: str, seconds: float, **changes: Any) -> dict[str, Any]:
        start = f"2026-01-01T00:00:{second:06.3f}+00:00"
        return ledger_row(rule, "x", seconds / 3600, submit_time=start, **changes)

    alone = [at(0, "decode", 5), at(5, "decode", 5), at(20, "train", 9)]
    assert side_by_side(alone, "decode") == (0, 2)
    assert side_by_side([*alone, at(9.5, "train", 1)], "decode") == (1, 2)
    assert side_by_side([at(0, "decode", 30), at(5, "decode", 5)], "decode") == (2, 2)
    cluster = [at(0, "decode", 9, node_hours=0.1), at(1, "decode", 9, node_hours=0.1)]
    assert side_by_side(cluster, "decode") == (0, 0)


# --- block lengths ------------------------------------------------------------------------------


def oracle_lengths(block_id: np.ndarray, document_id: np.ndarray) -> list[int]:
    found = []
    for blocks, documents in zip(block_id.tolist(), document_id.tolist(), strict=True):
        members: dict[int, list[int]] = {}
        for at, block in enumerate(blocks):
            members.setdefault(block, []).append(at)
        for block, places in members.items():
            first = places[0]
            context = first == 0 or documents[first] != documents[first - 1]
            if block >= 0 and not context:
                found.append(len(places))
    return found


def test_block_lengths_leave_out_context_and_padding():
    rng = np.random.default_rng(3)
    rows, length = 40, 37
    block_id = np.full((rows, length), -1, np.int32)
    document_id = np.full((rows, length), -1, np.int32)
    piece = 0
    for row in range(rows):
        at = block = 0
        while at < length - 4:
            stop = min(at + int(rng.integers(2, 20)), length)
            block_id[row, at], document_id[row, at:stop] = block, piece
            at, block = at + 1, block + 1
            while at < stop:
                end = min(at + int(rng.integers(1, 7)), stop)
                block_id[row, at:end] = block
                at, block = end, block + 1
            piece += 1
    expected = oracle_lengths(block_id, document_id)
    assert sorted(block_lengths(block_id, document_id).tolist()) == sorted(expected)

    none = np.full((2, 5), -1, np.int32)
    assert len(block_lengths(none, none)) == 0


def test_packed_file_is_read_in_all_its_batches(tmp_path: Path):
    schema = packed_schema(4, {})
    path = tmp_path / "train.arrow"
    block = pa.array([[0, 1, 1, 2]], type=pa.list_(pa.int32(), 4))
    piece = pa.array([[0, 0, 0, 0]], type=pa.list_(pa.int32(), 4))
    ids = pa.array([[9, 9, 9, 9]], type=pa.list_(pa.uint32(), 4))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for _ in range(3):
            writer.write_batch(pa.RecordBatch.from_arrays([ids, block, piece], schema=schema))
    assert read_block_lengths(path).tolist() == [2, 1] * 3
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ArtifactError, match=r"train\.arrow is no packed split"):
        read_block_lengths(path)


# --- bases, coverage, training ------------------------------------------------------------------


def test_a_base_is_an_arm_of_its_own_under_every_seed(plan: ReportPlan, tmp_path: Path):
    one = plan.cells[0]
    rows = [
        {"metric": m, "decoder": d, "value": 1} for m, d in [(BASE, ""), (BASE, "ar"), (AR, "")]
    ]
    scores = [CellScores("a", seed, rows, rows) for seed in (0, 1)]
    cells = [replace(one, arm="a", seed=seed) for seed in (0, 1)]
    names = base_names(cells)
    assert names == {one.base: "base model"}
    found = base_scores(cells, scores, names)
    assert [(cell.arm, cell.seed) for cell in found] == [("base model", 0), ("base model", 1)]
    assert found[0].scores == found[0].documents == [{"metric": AR, "decoder": "", "value": 1}]

    cells[1] = replace(cells[1], base=tmp_path / "other")
    names = base_names(cells)
    assert list(names.values()) == ["base model pretrained", "base model other"]
    assert [cell.seed for cell in base_scores(cells, scores, names)] == [0, 1]


def test_coverage_by_source(plan: ReportPlan):
    heldout = heldout_documents(plan.cells[0].pack)
    assert heldout == HELDOUT
    assert coverage(SCORED, heldout) == [Share("wiki-leads", 40, 50), Share("python-stdlib", 0, 1)]
    assert text.share(40, 50) == "40 of 50 (80 %)"


def test_training_of_bases_and_cells(plan: ReportPlan, tmp_path: Path):
    (base,) = training_of_bases([plan.cells[0].base, tmp_path / "imported"])
    assert (base.tokens, base.peak_rate) == (100_000, 3e-3)
    assert base.last_rate == pytest.approx(3e-5)
    assert base.loss == pytest.approx(BASE_LOSS)
    (cell,) = training_of_cells(plan.cells)
    assert (cell.tokens, cell.peak_rate) == (60 * 40_960, 5e-4)
    panels = training_panels(plan.cells)
    assert list(panels) == ["nelbo", "ar", "length"]
    tokens, values = panels["ar"]["fixed"][0]
    assert len(tokens) == len(values) == 60
    assert (np.diff(tokens) > 0).all()


# --- generations --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ReportPlan:
    root = tmp_path_factory.mktemp("study")
    return make_study(root, arms=["fixed"], seeds=[0], decoders=["ar", "threshold-0.6"])


def test_generations_tell_text_steps_and_probabilities(plan: ReportPlan):
    tokenizer = load_tokenizer(plan.tokenizer)
    directory = plan.cells[0].decodes["continuation.threshold-0.6"]
    first, second = read_generations(directory, 2, tokenizer)
    tokens = [token for block in first.blocks for token in block.tokens]
    shown = "".join(token.text for token in tokens)
    assert shown.endswith(END_MARK)
    assert first.prompt + shown[: -len(END_MARK)] in text_of("argparse.py")
    assert second.prompt.startswith(HOSTILE[:9])
    assert first.finished
    assert first.tokens == len(tokens) == 60
    assert [block.forced for block in first.blocks[:3]] == [False, True, False]

    _, events, _ = read_trace(directory / "trace.arrows")
    logged = [
        (event["nfe"], event["step"], event["prob"])
        for event in events.to_pylist()
        if event["request"] == 0 and event["type"] == "COMMIT"
    ]
    assert sorted((t.nfe, t.step, t.prob) for t in tokens) == sorted(logged)
    assert all(0 <= token.step < block.steps for block in first.blocks for token in block.tokens)
    assert all(0 < token.audit <= 1 for token in tokens)
    assert first.nfe >= max(token.nfe for token in tokens)


def test_ar_blocks_hold_one_token(plan: ReportPlan):
    tokenizer = load_tokenizer(plan.tokenizer)
    (generation,) = read_generations(plan.cells[0].decodes["continuation.ar"], 1, tokenizer)
    assert generation.longest_block == 1
    assert generation.tokens_per_forward == 60 / generation.nfe


def test_a_slot_inserted_in_the_middle_is_read_in_text_order():
    base = {"request": 0, "block": 0, "step": 0, "nfe": 1, "prob": 0.5, "left_uid": -1}
    events = [
        {"type": "OPEN", "uid": -1, "new_id": -1, "length": 3},
        {"type": "INSERT", "uid": 5, "left_uid": 4, "new_id": 99, "length": -1},
        {"type": "INSERT", "uid": 6, "left_uid": 5, "new_id": 99, "length": -1},
        {"type": "INSERT", "uid": 7, "left_uid": 5, "new_id": 99, "length": -1},
        *({"type": "FILL", "uid": u, "new_id": 10 + u, "length": -1} for u in (5, 6, 7)),
        *({"type": "COMMIT", "uid": u, "new_id": 10 + u, "length": -1} for u in (5, 6, 7)),
        {"type": "COMPLETE", "uid": -1, "new_id": -1, "length": 3},
    ]
    table = pa.Table.from_pylist([base | event for event in events])
    ((slots, opened, _, forced),) = fold_blocks(table, [0])[0].closed
    assert [slot.new_id for slot in slots] == [15, 17, 16]
    assert (opened, forced) == (3, False)


def test_edits_are_counted_and_the_most_edited_is_told_step_by_step(
    plan: ReportPlan, monkeypatch: pytest.MonkeyPatch
):
    kinds = [("INSERT", -1), ("INSERT", 2), ("SUBSTITUTE", 1), ("FILL", 1), ("DELETE", 3)]
    rows = [{"request": 4, "type": kind, "step": step} for kind, step in kinds]
    rows.append({"request": 5, "type": "INSERT", "step": -1})
    assert generations.edits_of(pa.Table.from_pylist(rows)) == {4: 3}

    monkeypatch.setattr(generations, "edits_of", lambda events: Counter({1: 3}))
    directory = plan.cells[0].decodes["continuation.threshold-0.6"]
    most, first = read_generations(directory, 1, load_tokenizer(plan.tokenizer))
    assert (most.edits, first.edits, first.history) == (3, 0, "")
    steps = sum(block.steps for block in most.blocks)
    assert most.history.count("<td>step ") == steps
    assert most.history.count("<h2>Block ") == len(most.blocks)
    assert "<script" not in most.history  # the text of request 1 is hostile


def test_log_and_samples_that_disagree_are_named(plan: ReportPlan, tmp_path: Path):
    source = plan.cells[0].decodes["continuation.ar"]
    import pyarrow.parquet as pq

    rows = pq.read_table(source / "samples.parquet").to_pylist()
    rows[1]["token_ids"][3] += 1
    (tmp_path / "trace.arrows").write_bytes((source / "trace.arrows").read_bytes())
    table = pa.Table.from_pylist(rows, schema=SAMPLES)
    write_table(tmp_path / "samples.parquet", table, SAMPLES)
    tokenizer = load_tokenizer(plan.tokenizer)
    assert len(read_generations(tmp_path, 1, tokenizer)) == 1
    with pytest.raises(ArtifactError, match="request 1 gives other tokens"):
        read_generations(tmp_path, 2, tokenizer)


# --- numbers ------------------------------------------------------------------------------------


def estimate(values: list[float], seeds: Interval | None, documents: Interval | None) -> Estimate:
    key = Key("t", 1, "", "m")
    return Estimate("a", key, "u", dict(enumerate(values)), seeds, documents, 9, ("why",))


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (estimate([], None, None), ("not measured", "", "")),
        (estimate([math.nan], None, None), ("not measured", "", "")),
        (estimate([2.34567], None, None), ("2.346", "none, n = 1", "\N{EN DASH}")),
        (
            estimate([2.3456], Interval(2.31, 2.38), Interval(2.2, 2.5)),
            ("2.35", "[2.31, 2.38]", "[2.20, 2.50]"),
        ),
        (
            estimate([-0.025], Interval(-0.05, -0.0002), None),
            (
                "\N{MINUS SIGN}0.0250",
                "[\N{MINUS SIGN}0.0500, \N{MINUS SIGN}0.0002]",
                "\N{EN DASH}",
            ),
        ),
        (
            estimate([2.5e6, 2.5e6], Interval(2.5e6, 2.5e6), Interval(2.4e6, 2.6e6)),
            ("2.50\N{NO-BREAK SPACE}M", "all equal", "[2.40, 2.60]"),
        ),
        (estimate([0.0, 0.0], Interval(0.0, 0.0), None), ("0.00", "all equal", "\N{EN DASH}")),
    ],
)
def test_numbers_have_the_digits_their_interval_supports(
    found: Estimate, expected: tuple[str, str, str]
):
    shown = text.estimate_text(found)
    assert (shown["mean"], shown["seeds"], shown["documents"]) == expected
    assert shown["note"] == "why"


def test_missing_estimate_is_said_to_be_so():
    assert text.estimate_text(None)["mean"] == "\N{EN DASH}"


def test_error_of_a_bound_stands_beside_it():
    noise = estimate([0.0103, 0.0097], None, None)
    shown = text.estimate_text(estimate([2.5], None, Interval(2.4, 2.6)), noise)
    assert shown["noise"] == "±0.010"
    assert text.estimate_text(noise)["noise"] == ""
    lost = estimate([], None, None)
    assert text.estimate_text(estimate([2.5], None, None), lost)["noise"] == "not measured"


@pytest.mark.parametrize(
    ("p_adjusted", "expected"),
    [
        (0.0301, ("0.030", "lower")),
        (0.0002, ("< 0.001", "lower")),
        (0.0512, ("0.051", "none")),
        (None, ("\N{EN DASH}", "none")),
    ],
)
def test_what_a_difference_allows_to_say(p_adjusted: float | None, expected: tuple[str, str]):
    away = Interval(-0.4, -0.1)
    gap = Difference("a", "b", Key("t", 1, "", "m"), "u", -0.2, 3, away, away, 9, 0.01, p_adjusted)
    shown = text.difference_text(gap, 0.95)
    assert (shown["p"], shown["verdict"]) == expected


def test_durations_and_hours():
    assert text.duration(12.34) == "12.3 s"
    assert text.duration(600) == "10.0 min"
    assert text.duration(9000) == "2.5 h"
    assert text.hours(None) == "\N{EN DASH}"
    assert text.hours(0.012345) == "0.0123"
    assert text.hours(12345.6) == "12,346"
