"""One step: its gradient does not depend on how rows were grouped, and inputs are checked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from abf.errors import ArtifactError, ConfigError, DivergenceError
from abf.model.layers import Layer
from abf.model.transformer import Transformer
from abf.train.parallel import World
from abf.train.step import Trainer
from tests.train.tiny_run import L, new_model, tiny_config, write_rows


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("packed"))


def trainer(packed: Path, *, model: Transformer | None = None, **changes: Any) -> Trainer:
    return Trainer(tiny_config(**changes), seed=0, model=model or new_model(), packed=packed)


@pytest.mark.parametrize("kind", ["block", "ar"])
@pytest.mark.parametrize("micro_rows", [1, 2, 3])
def test_micro_batches_do_not_change_the_gradient(packed: Path, kind: str, micro_rows: int) -> None:
    objective: dict[str, Any] = {"objective": {"kind": kind}}
    whole = trainer(packed, **objective)
    parts = trainer(packed, micro_rows=micro_rows, **objective)
    sums, counts, masked, _ = whole.gradients(0)
    other_sums, other_counts, other_masked, _ = parts.gradients(0)
    assert (counts, masked) == (other_counts, other_masked)
    assert sums == pytest.approx(other_sums, rel=1e-6)
    one, two = whole.optimiser.gradients, parts.optimiser.gradients
    assert one.abs().max() > 1e-3
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_recomputed_layers_give_the_very_gradient(
    packed: Path, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[int] = []
    real = Layer.forward

    def counted(self: Layer, *inputs: Any) -> torch.Tensor:
        calls.append(inputs[3])
        return real(self, *inputs)

    monkeypatch.setattr(Layer, "forward", counted)
    kept = trainer(packed, precision=precision)
    found = kept.gradients(0)
    assert calls == [0, 1]
    again = trainer(packed, precision=precision, checkpoint_activations=True)
    assert again.gradients(0) == found
    assert calls == [0, 1, 0, 1, 1, 0]  # backward computes them anew, last first
    assert torch.equal(kept.optimiser.gradients, again.optimiser.gradients)
    assert all("forward" not in vars(layer) for layer in again.model.layers)


def test_counts_are_those_of_the_rows(packed: Path) -> None:
    run = trainer(packed)
    _, counts, masked, _ = run.gradients(0)
    rows, _ = run.row_indices(0)
    batch = run.rows.rows(rows)
    tokens = blocks = 0
    for blocks_of_row, documents in zip(batch.block_id, batch.document_id, strict=True):
        for document in set(documents[documents >= 0].tolist()):
            inside = blocks_of_row[documents == document]
            tokens += len(inside) - 1  # the document token is context
            blocks += len(set(inside[1:].tolist()))
    assert counts == {"nelbo": tokens, "ar": tokens, "length": blocks}
    assert 0 < masked < tokens


def test_a_row_of_padding_alone_contributes_nothing(packed: Path, tmp_path: Path) -> None:
    with pa.ipc.open_file(str(packed)) as reader:
        table = reader.read_all()
    empty = pa.table(
        [
            pa.array([[value] * L], type=table.schema.field(name).type)
            for name, value in (("token_ids", 0), ("block_id", -1), ("document_id", -1))
        ],
        schema=table.schema,
    )
    path = tmp_path / "train.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(pa.concat_tables([table.slice(0, 3), empty]).combine_chunks())
    with_padding = trainer(path, micro_rows=1)
    with_padding.gradients(0)
    assert torch.isfinite(with_padding.optimiser.gradients).all()
    assert with_padding.optimiser.gradients.any()


def test_a_step_is_a_function_of_its_number(packed: Path) -> None:
    first, second = trainer(packed), trainer(packed)
    second.gradients(7)  # what was done before does not matter
    assert first.gradients(3) == second.gradients(3)
    assert torch.equal(first.optimiser.gradients, second.optimiser.gradients)


def test_steps_round_tokens_up(packed: Path) -> None:
    assert trainer(packed, tokens=1).steps == 1
    assert trainer(packed, tokens=4 * L).steps == 1
    assert trainer(packed, tokens=4 * L + 1).steps == 2


def test_rows_that_do_not_fit_the_model_are_refused(packed: Path) -> None:
    def model(**changes: Any) -> Transformer:
        return Transformer(new_model().config.model_copy(update=changes))

    with pytest.raises(ArtifactError, match="vocabulary of 61, the model has 64"):
        trainer(packed, model=model(vocab_size=64))
    with pytest.raises(ArtifactError, match="up to 8 tokens, the model's length head knows 4"):
        trainer(packed, model=model(max_block=4))
    with pytest.raises(ArtifactError, match=f"rows of {L} tokens, the model 16 positions"):
        trainer(packed, model=model(max_positions=16))


def test_divergence_promises_no_checkpoint(packed: Path) -> None:
    """A step knows of none; there may be none."""
    model = new_model()
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(DivergenceError) as caught:
        trainer(packed, model=model).step(1)
    assert "its update was not applied and no checkpoint holds it. Batch:" in str(caught.value)
    assert "stands" not in str(caught.value)


def test_rows_are_shared_out_without_loss_or_overlap() -> None:
    for rows in range(3, 20):
        parts = [np.arange(rows)[World(rank, 3).share(rows)] for rank in range(3)]
        assert np.concatenate(parts).tolist() == list(range(rows))
        assert max(map(len, parts)) - min(map(len, parts)) <= 1
    with pytest.raises(ConfigError, match="batch_rows is 2, but 3 ranks"):
        World(0, 3).share(2)
