"""Memory of a training: computed against what tensors hold, and no logits of whole rows anywhere.

Letters: V vocabulary, L row length.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from abf.data.loader import PackedRows
from abf.diffusion.config import Corruption, LossConfig, MaskedCorruption, PathCorruption
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.head import CHUNK
from abf.diffusion.loss import loss_terms
from abf.diffusion.terms import combine, term_weights
from abf.model.store import empty_model, with_edit_heads
from abf.model.transformer import Transformer
from abf.train.memory import Pass, Spread, parameters, peak_memory
from benchmarks.allocations import Allocations
from benchmarks.bench_memory import SHAPES, SMALL, measured, shape, table
from benchmarks.bench_train import write_rows

DOCS = Path(__file__).parents[2] / "docs" / "memory.md"


def test_allocations_are_counted_until_they_are_freed() -> None:
    before = torch.ones(1000)
    with Allocations() as seen:
        one = torch.zeros(250)  # 1000 bytes
        two = one + 1
        view = two[10:]
        one.add_(before[:250])
        assert seen.live == 2000
        del two
        assert seen.live == 2000, "a view keeps its storage"
        del view
        assert seen.live == 1000
        del one
        torch.zeros(2, 5)
    assert (seen.live, seen.peak) == (0, 2000)
    assert seen.largest == (250, (250,))


@pytest.mark.parametrize("name", SHAPES)
def test_parameters_are_counted(name: str) -> None:
    model = empty_model(SHAPES[name])
    assert parameters(SHAPES[name]) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", [False, True])
def test_what_is_computed_is_what_tensors_hold(
    tmp_path: Path, precision: str, recompute: bool
) -> None:
    cfg, _, rows = SMALL["1.3M"]
    for length in (256, 512):
        held, computed = measured(
            cfg, length, rows, precision=precision, recompute=recompute, folder=tmp_path
        )
        assert computed.total == pytest.approx(held, rel=0.05)
        # Weights and moments are easily counted; what a step needs beside them is the question.
        states = computed.weights + computed.gradients + computed.moments
        assert computed.total - states == pytest.approx(held - states, rel=0.05)


def test_shards_share_the_states() -> None:
    cfg, work = SHAPES["1.7B"], Pass.of_masks(1, 1024)
    alone = peak_memory(cfg, work)
    assert alone.weights + alone.gradients + alone.moments == 16 * parameters(cfg)
    assert alone.gathered == 0
    for spread, shards in (
        (Spread("full", 16), 16),
        (Spread("hybrid", 16), 4),
        (Spread("none", 16), 1),
        (Spread("hybrid", 2), 2),
    ):
        found = peak_memory(cfg, work, spread)
        assert found.weights == alone.weights / shards
        assert (found.gathered > 0) == (shards > 1)
    more = peak_memory(cfg, Pass.of_masks(2, 1024))
    assert more.activations == 2 * alone.activations
    assert more.head == alone.head, "a chunk is a chunk"


def test_the_page_is_what_is_computed() -> None:
    text = DOCS.read_text()
    assert "\n".join(table()).strip() in text


@pytest.mark.parametrize(
    ("corruption", "length"), [(MaskedCorruption(), 4096), (PathCorruption(), 2048)]
)
def test_logits_of_whole_rows_never_exist(
    tmp_path: Path, corruption: Corruption, length: int
) -> None:
    """Vocabulary 152k: no tensor of a forward and backward pass is larger than a chunk of logits,
    or the output matrix, though both streams have 2 L rows."""
    vocab = 151_936
    cfg = shape(vocab, 16, 1, 2, 1, 32)
    model = Transformer(cfg)
    model.initialise(torch.Generator().manual_seed(0))
    if corruption.kind == "path":
        model = with_edit_heads(model)
    write_rows(tmp_path / "rows.arrow", vocabulary=vocab, length=length, rows=1)
    batch = PackedRows(tmp_path / "rows.arrow").rows([0])
    noised = build_corruption(corruption, mask_id=vocab).apply(
        batch, seed=0, epochs=np.zeros(1, dtype=np.int64)
    )
    loss = LossConfig()
    with Allocations() as seen, torch.autocast("cpu", torch.bfloat16):
        terms = loss_terms(model, batch, noised=noised, loss=loss, backend="tiles")
        total = combine(terms, {n: term.count for n, term in terms.items()}, term_weights(loss))
        total.backward()
    elements, found = seen.largest
    whole = 2 * length * vocab
    assert elements <= max(CHUNK, vocab * cfg.d_model)
    assert elements > CHUNK - vocab, f"the head has worked: {found}"
    assert elements < whole / 8
    # Nor do they add up to that: everything alive at once is less than all logits in bf16.
    assert seen.peak < 2 * whole
    assert float(total.detach()) > 0
