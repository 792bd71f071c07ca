"""Bits per byte against `transformers`, against AR at block length 1, against enumeration."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abf.artifacts import PIECES, TOKENS, read_table
from abf.data.loader import PackedRows
from abf.diffusion.config import (
    Corruption,
    DraftsConfig,
    LossConfig,
    MaskedCorruption,
    PathCorruption,
    UniformRate,
)
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.loss import block_charges
from abf.eval.base import Measure, Ratio, Single, Subject
from abf.eval.config import LikelihoodTask
from abf.eval.likelihood import NOISE_SEED, Likelihood
from abf.model.attention import RangeAttend
from abf.model.huggingface import save_hf
from abf.model.store import load_model, save_model, with_edit_heads
from abf.model.transformer import Transformer
from abf.train.config import ArObjective, BlockObjective, Objective
from tests.eval.corpus import Corpus, L

BLOCK = BlockObjective()


def subject(corpus: Corpus, objective: Objective = BLOCK) -> Subject:
    return Subject(
        model_dir=corpus.model,
        base_dir=corpus.base,
        packed=corpus.packed,
        tokenizer=corpus.tokenizer / "tokenizer",
        objective=objective,
        precision="fp32",
        label="test",
    )


def measured(corpus: Corpus, objective: Objective = BLOCK, **settings: Any) -> dict[str, Measure]:
    found = Likelihood(LikelihoodTask(**settings)).measure(subject(corpus, objective), None)
    return {measure.metric: measure for measure in found}


def value(measure: Measure) -> float:
    if isinstance(measure, Single):
        assert measure.value is not None
        return measure.value
    return float(measure.numerator.sum() / measure.denominator.sum())


@pytest.fixture(scope="module")
def block_figures(corpus: Corpus) -> dict[str, Measure]:
    return measured(corpus, samples=2)


def documents(corpus: Corpus) -> list[dict]:
    return read_table(corpus.tokens / "tokens" / "heldout-00000.parquet", TOKENS).to_pylist()


def test_ar_figures_are_those_of_transformers(
    corpus: Corpus, block_figures: dict[str, Measure], tmp_path: Path
) -> None:
    """Straight from the tokens of each document: no packing, no rows of ours."""
    from transformers import AutoModelForCausalLM

    save_hf(load_model(corpus.model), tmp_path / "run")
    for metric, folder in (
        ("ar_bits_per_byte", tmp_path / "run"),
        ("base_bits_per_byte", corpus.base),
    ):
        judge = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        wanted = {}
        for document in documents(corpus):
            slots, nats = [*document["token_ids"], 0], 0.0
            for start in range(0, len(slots), L - 1):
                piece = torch.tensor([[0, *slots[start : start + L - 1]]])
                with torch.no_grad():
                    log_probs = judge(piece).logits[0, :-1].log_softmax(-1)
                nats -= float(log_probs.gather(1, piece[0, 1:, None]).sum())
            wanted[document["doc_id"]] = (nats / math.log(2), document["n_bytes"])
        found = block_figures[metric]
        assert isinstance(found, Ratio)
        assert set(found.documents) == wanted.keys()
        for name, bits, n_bytes in zip(
            found.documents, found.numerator, found.denominator, strict=True
        ):
            assert bits == pytest.approx(wanted[name][0], rel=1e-5)
            assert n_bytes == wanted[name][1]


def test_blocks_of_one_are_the_ar_model(singles: Corpus) -> None:
    found = measured(singles, samples=2, max_rows=4)
    ar, bound = found["ar_bits_per_byte"], found["bound_bits_per_byte"]
    assert isinstance(ar, Ratio)
    assert isinstance(bound, Ratio)
    assert np.allclose(ar.numerator, bound.numerator, rtol=1e-5)
    assert value(found["bound_monte_carlo_error"]) < 1e-6
    assert value(found["mean_block_length"]) == 1


def test_bound_is_the_enumerated_one(corpus: Corpus) -> None:
    """One row of short documents: every subset of every block, one block at a time."""
    found = measured(corpus, samples=64, max_rows=1)
    rows = PackedRows(corpus.packed / "packed" / "heldout.arrow")
    batch, model = rows.rows([0]), load_model(corpus.model)
    nats, boundary, n_blocks = 0.0, 0.0, 0
    for number in np.unique(batch.document_id[batch.document_id >= 0]):
        inside = batch.document_id[0] == number
        ids, blocks = batch.token_ids[0, inside], batch.block_id[0, inside]
        for block in np.unique(blocks)[1:]:
            (place,) = np.nonzero(blocks == block)
            bound, length = enumerated(model, ids, int(place[0]), len(place))
            nats, boundary, n_blocks = nats + bound, boundary + length, n_blocks + 1
    bytes_ = read_table(corpus.packed / "packed" / "heldout.pieces.parquet", PIECES)
    n_bytes = sum(p["n_bytes"] for p in bytes_.to_pylist() if p["row"] == 0)
    error = value(found["bound_monte_carlo_error"])
    exact = nats / math.log(2) / n_bytes
    assert 0 < error < 0.05 * exact
    assert abs(value(found["bound_bits_per_byte"]) - exact) < 4 * error
    both = value(found["bound_with_boundary_bits_per_byte"])
    extra = boundary / math.log(2)
    assert both - value(found["bound_bits_per_byte"]) == pytest.approx(extra / n_bytes, rel=1e-4)
    assert value(found["boundary_bits_per_block"]) == pytest.approx(extra / n_blocks, rel=1e-4)


def enumerated(model: Transformer, ids: np.ndarray, start: int, size: int) -> tuple[float, float]:
    """Exact bound of one block (sum over k of 1/k E[CE sum of a k-subset]) and -log p(size)."""
    row = torch.arange(start + size)
    end = torch.where(row < start, row + 1, start + size)
    ranges = torch.stack([row * 0, end, row * 0, row * 0], -1)[None]
    attend = RangeAttend(ranges, backend="reference")
    total = 0.0
    with torch.inference_mode():
        for k in range(1, size + 1):
            losses = []
            for subset in combinations(range(start, start + size), k):
                noisy = torch.from_numpy(ids[: start + size].copy())
                noisy[list(subset)] = model.mask_id
                states = model.hidden(noisy[None], row[None], attend)[0]
                log_probs = model.logits(states).log_softmax(-1)
                # shifted: slot j is read from j - 1, which for a block's first slot is clean
                losses.append(-sum(float(log_probs[j - 1, ids[j]]) for j in subset))
            total += sum(losses) / len(losses) / k
        clean = torch.from_numpy(ids[: start + size].copy())[None]
        state = model.hidden(clean, row[None], attend)[0, start - 1]
        length = -float(model.length_logits(state).log_softmax(-1)[size])
    return total, length


@pytest.fixture(scope="module")
def path_corpus(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    """The same, its model with edit heads that say something."""
    model = with_edit_heads(load_model(corpus.model))
    with torch.no_grad():
        model.edit_head.weight.normal_(0, 0.1, generator=torch.Generator().manual_seed(0))
    folder = tmp_path_factory.mktemp("path") / "model"
    save_model(model, folder)
    return replace(corpus, model=folder)


PATH = PathCorruption(late=0.3, wrong=0.1)


def test_a_path_is_reported_by_its_aligned_bound(path_corpus: Corpus) -> None:
    """Summed here by hand over the same draws; by columns that are known it would be more."""
    objective = BlockObjective(corruption=PATH)
    found = measured(path_corpus, objective, samples=2, max_rows=2)["bound_bits_per_byte"]
    assert isinstance(found, Ratio)
    packed = PackedRows(path_corpus.packed / "packed" / "heldout.arrow")
    batch = packed.rows(np.array([0, len(packed) // 2]))
    model = load_model(path_corpus.model).eval()
    corruption = build_corruption(PATH, mask_id=model.mask_id)
    nats = {True: 0.0, False: 0.0}
    for draw in range(2):
        noised = corruption.apply(batch, seed=NOISE_SEED + draw, epochs=np.zeros(2, dtype=int))
        for aligned in nats:
            with torch.no_grad():
                charges = block_charges(
                    model, batch, noised, loss=objective.loss, backend="reference",
                    terms=("nelbo",), aligned=aligned,
                )  # fmt: skip
            nats[aligned] += float(charges["nelbo"].sum) / 2 / math.log(2)
    assert found.numerator.sum() == pytest.approx(nats[True], rel=1e-4)
    assert nats[False] > 1.005 * nats[True]


CLIPPED = MaskedCorruption(law=UniformRate(low=0.3, high=0.8), weight="rate")


@pytest.mark.parametrize(
    ("trained", "reported"),
    [(CLIPPED, MaskedCorruption()), (PATH.model_copy(update={"drafts": DraftsConfig()}), PATH)],
    ids=["clipped rates", "drafts"],
)
def test_what_is_no_bound_in_training_is_one_in_the_report(
    path_corpus: Corpus, trained: Corruption, reported: Corruption
) -> None:
    loss = LossConfig(edit_weight=1, complete_weight=1) if trained.kind == "path" else LossConfig()
    one, other = (
        measured(path_corpus, BlockObjective(corruption=c, loss=weights), samples=1, max_rows=2)
        for c, weights in ((trained, loss), (reported, LossConfig()))
    )
    for metric in ("bound_bits_per_byte", "bound_with_boundary_bits_per_byte"):
        assert value(one[metric]) == pytest.approx(value(other[metric]), rel=1e-9)


def test_an_ar_run_has_no_block_rows(corpus: Corpus) -> None:
    found = measured(corpus, ArObjective(), max_rows=2)
    assert found.keys() == {"ar_bits_per_byte", "base_bits_per_byte"}


def test_a_block_causal_clean_stream_has_no_ar_view(corpus: Corpus) -> None:
    loss = LossConfig(clean_stream="block_causal", ar_weight=0)
    found = measured(corpus, BlockObjective(loss=loss), max_rows=2, samples=1)
    assert "ar_bits_per_byte" not in found
    assert "bound_bits_per_byte" in found
    error = found["bound_monte_carlo_error"]
    assert isinstance(error, Single)
    assert error.value is None
    assert error.note.startswith("not measured")


def test_some_rows_and_any_batch(corpus: Corpus, block_figures: dict[str, Measure]) -> None:
    other = measured(corpus, samples=2, batch_rows=3)
    for metric, measure in block_figures.items():
        assert value(other[metric]) == pytest.approx(value(measure), rel=1e-4), metric
    few = measured(corpus, samples=1, max_rows=2)["ar_bits_per_byte"]
    everything = block_figures["ar_bits_per_byte"]
    assert isinstance(few, Ratio)
    assert isinstance(everything, Ratio)
    folder = corpus.packed / "packed"
    middle = len(PackedRows(folder / "heldout.arrow")) // 2
    pieces = read_table(folder / "heldout.pieces.parquet", PIECES).to_pylist()
    assert set(few.documents) == {p["doc_id"] for p in pieces if p["row"] in (0, middle)}
    assert 0 < len(few.documents) < len(everything.documents)
    assert few.denominator.sum() < everything.denominator.sum()


def test_mean_block_length_counts_closing_tokens(
    corpus: Corpus, block_figures: dict[str, Measure]
) -> None:
    lengths = block_figures["mean_block_length"]
    assert isinstance(lengths, Ratio)
    slots = sum(len(d["token_ids"]) + 1 for d in documents(corpus))
    assert lengths.numerator.sum() == slots
