"""The path through the real model: corruption, layout, heads, loss against plain passes."""

from __future__ import annotations

import math
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig, PathCorruption
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.corrupt.path import PathNoised
from abf.diffusion.layout import block_starts, positions, two_stream
from abf.diffusion.loss import block_charges, scatter
from abf.diffusion.path.law import ABSENT, MASKED, WRONG, PathLaw
from abf.diffusion.terms import count_terms
from abf.model.config import ModelConfig
from abf.model.huggingface import save_hf
from abf.model.store import load_weights, with_edit_heads
from abf.model.transformer import EDITS, Transformer
from tests.diffusion.path.package import start_nats
from tests.diffusion.path.toy import (
    Answer,
    Model,
    Text,
    World,
    by_text,
    divergence,
    nodes,
    strip,
)
from tests.diffusion.rows import V, make_batch, take, tiny_model

LOSS = LossConfig(length_weight=1.0)
BATCH = make_batch([[[1, 3, 2, 4], [2, 5]], [[5, 1, 1], [3, 6, 2]]], 26)


def editing_model(seed: int = 0, **changes: Any) -> Transformer:
    """A tiny model whose heads all say something."""
    model = with_edit_heads(tiny_model(seed=seed, **changes)).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        model.edit_head.weight.normal_(0.0, 0.4, generator=generator)
        model.edit_head.bias.normal_(0.0, 0.5, generator=generator)
        model.end_embedding.normal_(0.0, 0.3, generator=generator)
    return model


def noise(
    batch: PackedBatch, cfg: PathCorruption, *, mask_id: int = V, seed: int = 0
) -> PathNoised:
    epochs = np.arange(len(batch.token_ids))
    return build_corruption(cfg, mask_id=mask_id).apply(batch, seed=seed, epochs=epochs)


def answer(
    model: Transformer, context: list[int], s: Text, tau: float, law: World, shift: bool = True
) -> Answer:
    """Rates of the model at a text, from one plain pass over context, text and end."""
    V, c, m = model.config.vocab_size, len(context), len(s)
    ids = torch.tensor([[*context, *s, model.end_id]])
    seen = torch.ones(c + m + 1, c + m + 1, dtype=torch.bool).tril()
    seen[c:, c:] = True  # the block sees all of itself
    place = torch.arange(c + m + 1)[None]

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, enable_gqa=True
        )

    with torch.no_grad():
        states = model.hidden(ids, place, attend)[0]
        token = torch.softmax(states[c - shift : c + m - shift] @ model.head_weight.T, dim=1)
        raw = dict(zip(EDITS, model.edits(states[c:]).T.numpy(), strict=True))
    u = math.exp(-tau)
    column = law.column(tau)
    clean = 1 - column["absent"] - column["masked"] - (V - 1) * column["each"]
    odds = (V - 1) * column["each"] / clean if tau else 0.0
    return Answer(
        insert=np.log1p(np.exp(raw["insert"])) / (1 + np.exp(-raw["insert_until"]) / u),
        token=token.numpy(),
        substitute=odds / (odds + np.exp(-raw["substitute"][:m])),
    )


def test_a_noisy_block_is_its_columns_in_order_and_an_end() -> None:
    cfg = PathCorruption(late=0.4, wrong=0.3)
    noised = noise(BATCH, cfg)
    at = noised.block_start
    for k, (row, start, columns) in enumerate(
        zip(noised.path.row, noised.path.start, noised.path.columns, strict=True)
    ):
        clean = BATCH.token_ids[row, start : start + columns]
        assert noised.path.clean[k, :columns].tolist() == clean.tolist()
        mine = noised.noisy_ids[row][at[row] == start]
        assert mine[-1] == V + 1
        assert mine[:-1].tolist() == noised.path.text[k, : noised.path.slots[k]].tolist()
        assert np.nonzero(at[row] == start)[0][0] == noised.path.first[k]
        assert noised.path.present[k].sum() == noised.path.slots[k] == len(mine) - 1
        assert noised.path.weight[k] == pytest.approx(2 * math.exp(noised.path.tau[k] / 2))
    assert len(noised.path.row) == block_starts(BATCH).sum()
    kept = noised.path.present.sum() / noised.path.columns.sum()
    assert 0.5 < kept < 1
    # The longest block counts on: position tells nothing of the clean length.
    streams = two_stream(BATCH, noised, clean_stream="context_causal")
    place = positions(BATCH.document_id)
    for k, (row, start) in enumerate(zip(noised.path.row, noised.path.start, strict=True)):
        found = streams.positions[
            row, noised.path.first[k] : noised.path.first[k] + noised.path.slots[k] + 1
        ]
        assert found.tolist() == list(range(place[row, start], place[row, start] + len(found)))


@pytest.mark.parametrize("tau", [0.0, 0.3, 1.1, 3.0])
def test_columns_are_drawn_by_the_law_to_the_last_digits(tau: float) -> None:
    """Evenly spread numbers instead of random ones; the law by integrals over waiting times."""
    world, count = World(3, 1, late=0.3, wrong=0.4), 20_000
    even = (np.arange(count) + 0.5) / count
    turned = np.random.default_rng(0).permutation(even)
    clean = np.full(count, 1)
    held, token = PathLaw(world.late, world.wrong, world.vocab).draw(
        np.array([tau]), clean, even, turned
    )
    law = world.column(tau)
    assert (held == ABSENT).mean() == pytest.approx(law["absent"], abs=1e-4)
    assert (held == MASKED).mean() == pytest.approx(law["masked"], abs=1e-4)
    for wrong in (0, 2):
        found = (token == wrong)[held == WRONG].sum() / count
        assert found == pytest.approx(law["each"], abs=5e-3)
    assert (held == WRONG).mean() == pytest.approx(2 * law["each"], abs=1e-4)
    assert (token[held != WRONG] == 1).all()


def test_states_are_met_as_often_as_the_law_says() -> None:
    cfg, draws = PathCorruption(late=0.3, wrong=0.4, stratify=False), 4000
    batch = take(make_batch([[[4, 3]]], 8), [0] * draws)
    noised = noise(batch, cfg)
    world = World(V, 4, cfg.late, cfg.wrong)
    for low, high in ((0.1, 0.3), (0.6, 0.8), (1.5, 2.0)):
        chosen = (noised.path.tau > low) & (noised.path.tau < high)
        columns = np.arange(noised.path.clean.shape[1]) < noised.path.columns[chosen, None]
        law = [world.column(float(tau)) for tau in noised.path.tau[chosen][:: chosen.sum() // 40]]
        absent = 1 - noised.path.present[chosen][columns].mean()
        expected = np.mean([one["absent"] for one in law])
        count = columns.sum()
        assert abs(absent - expected) < 5 * math.sqrt(expected / count) + 0.01
        slots = np.arange(noised.path.text.shape[1]) < noised.path.slots[chosen, None]
        masked = (noised.path.text[chosen] == V)[slots].sum() / count
        expected = np.mean([one["masked"] for one in law])
        assert abs(masked - expected) < 5 * math.sqrt(expected / count) + 0.01


@pytest.mark.parametrize("late", [0.3, 0.95])
@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("aligned", [True, False])
def test_charges_are_those_of_one_block_at_a_time(shift: bool, aligned: bool, late: float) -> None:
    """Against the definition, jump by jump, with a plain pass a block; of empty blocks, too."""
    vocab = 4
    model = editing_model(vocab_size=vocab, max_block=3)
    text = make_batch([[[2, 1, 3], [3, 2]]], 13)
    batch = replace(text, token_ids=text.token_ids % vocab)
    cfg = PathCorruption(late=late, wrong=0.2)
    noised = noise(batch, cfg, mask_id=vocab, seed=4)
    assert (noised.path.slots == 0).any() == (late > 0.5)
    loss = LossConfig(shift=shift)
    with torch.no_grad():
        charges = block_charges(
            model, batch, noised, loss=loss, backend="reference", terms=("nelbo",), aligned=aligned
        )
    found = scatter(charges["nelbo"], batch)
    world = World(vocab, 3, cfg.late, cfg.wrong)
    for k, (row, start, tau) in enumerate(
        zip(noised.path.row, noised.path.start, noised.path.tau.tolist(), strict=True)
    ):
        y = tuple(batch.token_ids[row, start : start + noised.path.columns[k]].tolist())
        s = tuple(noised.path.text[k, : noised.path.slots[k]].tolist())
        begins = start - positions(batch.document_id)[row, start]
        context = batch.token_ids[row, begins:start].tolist()
        said = answer(model, context, s, tau, world, shift)
        wanted = _at_state(world, said, y, s, tau, noised.path.present[k], aligned=aligned)
        assert found[row, start] == pytest.approx(noised.path.weight[k] * wanted, rel=1e-6)


def _at_state(
    world: World, said: Answer, y: Text, s: Text, tau: float, present: np.ndarray, *, aligned: bool
) -> float:
    """The integrand at one text, by its definition."""
    asked = by_text(world.model_jumps(lambda *_: said, s, tau))
    total, due = 0.0, defaultdict(float)
    for z, p in world.columns(y, tau):
        same = [v is not None for v in z] == present[: len(y)].tolist()
        if strip(z) != s or not (aligned or same):
            continue
        total += p
        for text, rate in by_text(world.path_jumps(y, z)).items():
            due[text] += p * rate
    return divergence({text: rate / total for text, rate in due.items()}, asked)


def test_the_bound_of_the_real_model_is_the_integral_and_above_the_truth() -> None:
    """A transformer over two tokens: Monte Carlo of the trained loss, the integral of its
    definition, and the enumerated likelihood of the texts its rates generate."""
    world = World(2, 2, late=0.25, wrong=0.15)
    model = editing_model(vocab_size=2, max_block=2, d_model=12)
    tables: dict[tuple[Text, float], Answer] = {}

    def rates(s: Text, tau: float) -> Answer:
        key = s, round(tau, 9)
        if key not in tables:
            tables[key] = answer(model, [0], s, tau, world)
        return tables[key]

    typed: Model = rates
    with torch.no_grad():
        state = model.hidden(
            torch.tensor([[0]]),
            torch.tensor([[0]]),
            lambda layer, q, k, v: v.repeat_interleave(2, 1),
        )
        starts = torch.softmax(model.length_logits(state[0, 0]), dim=0).numpy()
    likelihood = world.likelihood(typed, starts)
    assert sum(likelihood.values()) == pytest.approx(1, abs=1e-6)
    cfg = PathCorruption(late=world.late, wrong=world.wrong)
    for y in [(0, 1), (1, 1), (1,)]:
        times, weights = nodes(16)
        integral = start_nats(world, starts, y) + sum(
            w * world.by_definition(typed, y, float(t))["aligned"]
            for t, w in zip(times, weights, strict=True)
        )
        draws = 3000
        row = np.array([[0, *y]])
        one = PackedBatch(row, np.array([[0] + [1] * len(y)]), np.zeros_like(row), np.arange(1))
        many = take(one, [0] * draws)
        noised = noise(many, cfg, mask_id=2)
        with torch.no_grad():
            found = block_charges(
                model, many, noised, loss=LOSS, backend="tiles",
                terms=("nelbo", "length"), aligned=True,
            )  # fmt: skip
        nats = sum(scatter(found[name], many).sum(axis=1) for name in ("nelbo", "length"))
        error = float(np.std(nats)) / math.sqrt(draws)
        assert abs(float(np.mean(nats)) - integral) < 4.5 * error
        assert integral >= -math.log(likelihood[y]) - 1e-4


def test_every_head_of_the_path_learns_and_the_others_do_not() -> None:
    model = editing_model()
    noised = noise(BATCH, PathCorruption(late=0.3, wrong=0.3))
    charges = block_charges(
        model, BATCH, noised, loss=LOSS, backend="tiles", terms=count_terms(BATCH, LOSS)
    )
    torch.stack([term.sum for term in charges.values()]).sum().backward()
    grad = model.edit_head.bias.grad
    assert grad is not None
    moved = dict(zip(EDITS, (grad.abs() > 0).tolist(), strict=True))
    assert [name for name in EDITS if moved[name]] == ["insert", "insert_until", "substitute"]
    for parameter in (model.mask_embedding, model.end_embedding, model.embedding.weight):
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
        assert parameter.grad.abs().sum() > 0


def test_a_path_without_late_or_wrong_tokens_is_finite_and_reads_no_edit() -> None:
    model = editing_model()
    noised = noise(BATCH, PathCorruption(late=0.0, wrong=0.0))
    charges = block_charges(model, BATCH, noised, loss=LOSS, backend="tiles", terms=("nelbo",))
    charges["nelbo"].sum.backward()
    grad = model.edit_head.bias.grad
    assert grad is not None
    assert torch.isfinite(grad).all()
    assert not grad[EDITS.index("substitute")]
    assert grad[EDITS.index("insert")] > 0  # nothing is missing: every rate is too much


def test_heads_are_added_once_and_leave_the_model_as_it_was() -> None:
    plain = tiny_model()
    grown = with_edit_heads(plain)
    assert with_edit_heads(grown) is grown
    assert grown.config == plain.config.model_copy(update={"edit_heads": True})
    assert ModelConfig.model_validate_json(grown.config.model_dump_json()) == grown.config
    for name, value in plain.state_dict().items():
        assert torch.equal(grown.state_dict()[name], value)
    ids = torch.randint(0, V + 1, (2, 7), generator=torch.Generator().manual_seed(0))
    assert torch.equal(plain.embed(ids), grown.embed(ids))


def test_the_ar_view_of_an_editing_model_is_that_of_its_source(tmp_path: Path) -> None:
    plain = tiny_model(dtype=torch.float32)
    save_hf(plain, tmp_path / "plain")
    save_hf(with_edit_heads(plain), tmp_path / "grown")
    one, other = (
        load_weights(tmp_path / name / "model.safetensors") for name in ("plain", "grown")
    )
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
