"""Charges of drafts through the real model, against a plain pass a block and counting by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from abf.data.loader import PackedBatch
from abf.diffusion.config import DraftsConfig, LossConfig, PathCorruption
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.corrupt.path import PathNoised
from abf.diffusion.layout import positions
from abf.diffusion.loss import block_charges, loss_terms, scatter
from abf.diffusion.policy.align import align
from abf.diffusion.policy.watch import (
    COMPLETE_COUNTS,
    EDIT_COUNTS,
    summary,
    watch_complete,
    watch_edits,
)
from abf.diffusion.terms import count_terms
from abf.model.store import with_edit_heads
from abf.model.transformer import EDITS, Transformer
from tests.diffusion.rows import V, make_batch, take, tiny_model

LOSS = LossConfig(edit_weight=1.0, complete_weight=1.0)
BATCH = make_batch([[[4, 7, 3, 6], [2, 5]], [[5, 1, 8], [3, 6, 2]]], 30)
DRAFTS = DraftsConfig(share=0.6, masked=0.6)


def editing_model(seed: int = 0, **changes: Any) -> Transformer:
    model = with_edit_heads(tiny_model(seed=seed, max_block=16, **changes)).double()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        model.edit_head.weight.normal_(0.0, 0.4, generator=generator)
        model.edit_head.bias.normal_(0.0, 0.5, generator=generator)
        model.end_embedding.normal_(0.0, 0.3, generator=generator)
    return model


def noise(batch: PackedBatch, drafts: DraftsConfig | None = DRAFTS, *, seed: int = 0) -> PathNoised:
    corruption = build_corruption(PathCorruption(drafts=drafts), mask_id=V)
    return corruption.apply(batch, seed=seed, epochs=np.arange(len(batch.token_ids)))


def plain(model: Transformer, context: list[int], draft: list[int]) -> tuple[Any, Any]:
    """Log-probabilities of tokens [m, V] and raw edits {name: [m+1]} from one pass."""
    c, m = len(context), len(draft)
    seen = torch.ones(c + m + 1, c + m + 1, dtype=torch.bool).tril()
    seen[c:, c:] = True

    def attend(layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, enable_gqa=True
        )

    with torch.no_grad():
        ids = torch.tensor([[*context, *draft, model.end_id]])
        states = model.hidden(ids, torch.arange(c + m + 1)[None], attend)[0]
        token = torch.log_softmax(states[c - 1 : c + m - 1] @ model.head_weight.T, dim=1).numpy()
        raw = dict(zip(EDITS, model.edits(states[c:]).T.numpy(), strict=True))
    return token, raw


def by_hand(
    token: np.ndarray, raw: dict[str, np.ndarray], draft: list[int], clean: list[int]
) -> tuple[float, float]:
    """Nats of edits and of completion, in plain loops."""
    found = align(
        np.array([clean]), np.array([len(clean)]),
        np.array([draft or [V]]), np.array([len(draft)]), mask_id=V,
    )  # fmt: skip
    column, missing = found.column[0], found.missing[0]
    groups: list[list[int]] = [[]]  # gaps between the same visible tokens
    for i, held in enumerate(draft):
        groups[-1].append(i)
        if held != V:
            groups.append([])
    groups[-1].append(len(draft))
    nats = 0.0
    for gaps in groups:
        due = sum(int(missing[g]) for g in gaps)
        expected = sum(math.log1p(math.exp(raw["missing"][g])) for g in gaps)
        nats += (due * math.log(due / expected) if due else 0.0) - due + expected
        masks = [g for g in gaps if g < len(draft) and draft[g] == V]
        surplus = sum(column[g] < 0 for g in masks) / max(1, len(masks))
        for g in masks:
            away = 1 / (1 + math.exp(-raw["delete"][g]))
            nats -= surplus * math.log(away) + (1 - surplus) * math.log(1 - away)
            if column[g] >= 0:
                nats -= token[g, clean[column[g]]]
    for i, held in enumerate(draft):
        if held == V:
            continue
        odds = [0.0, raw["revise"][i], raw["delete"][i]]
        total = math.log(sum(math.exp(x) for x in odds))
        which = 2 if column[i] < 0 else 0 if clean[column[i]] == held else 1
        nats -= odds[which] - total
        if which == 1:
            nats -= token[i, clean[column[i]]]
    whole = 1 / (1 + math.exp(-raw["complete"][-1]))
    return nats, -math.log(whole if draft == clean else 1 - whole)


@pytest.mark.parametrize("seed", range(4))
def test_charges_are_those_of_one_draft_at_a_time(seed: int) -> None:
    model, noised = editing_model(seed), noise(BATCH, seed=seed)
    with torch.no_grad():
        charges = block_charges(
            model, BATCH, noised, loss=LOSS, backend="reference", terms=("edit", "complete")
        )
    edit, complete = (scatter(charges[name], BATCH) for name in ("edit", "complete"))
    drafts, wanted = noised.drafts, np.zeros((2, *BATCH.token_ids.shape))
    assert len(drafts.row) > 3
    for k, (row, start) in enumerate(zip(drafts.row, drafts.start, strict=True)):
        draft = drafts.text[k, : drafts.slots[k]].tolist()
        clean = drafts.clean[k, : drafts.columns[k]].tolist()
        begins = start - positions(BATCH.document_id)[row, start]
        context = BATCH.token_ids[row, begins:start].tolist()
        wanted[:, row, start] = by_hand(*plain(model, context, draft), draft, clean)
    np.testing.assert_allclose(edit, wanted[0] / DRAFTS.share, rtol=1e-7)
    np.testing.assert_allclose(complete, wanted[1] / DRAFTS.share, rtol=1e-7)
    assert float(charges["edit"].sum) == pytest.approx(edit.sum())


def test_all_heads_learn() -> None:
    model = editing_model()
    terms = loss_terms(model, BATCH, noised=noise(BATCH), loss=LOSS, backend="tiles")
    assert terms.keys() == {"nelbo", "ar", "length", "edit", "complete"}
    torch.stack([term.sum for term in terms.values()]).sum().backward()
    grad = model.edit_head.bias.grad
    assert grad is not None
    assert (grad.abs() > 0).all()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_drafts_leave_the_bound_what_it_is() -> None:
    """The mean over draws of the bound does not change when a share of blocks are drafts."""
    model, one = editing_model(), take(BATCH, [0])
    many = take(one, [0] * 400)

    def nats(drafts: DraftsConfig | None) -> np.ndarray:
        noised = noise(many, drafts)
        with torch.no_grad():
            charges = block_charges(
                model, many, noised, loss=LOSS, backend="tiles", terms=("nelbo",)
            )
        return scatter(charges["nelbo"], many).sum(axis=1)

    without, with_drafts = nats(None), nats(DRAFTS)
    error = math.hypot(np.std(without), np.std(with_drafts)) / math.sqrt(400)
    assert abs(without.mean() - with_drafts.mean()) < 4.5 * error


def test_rows_of_drafts_alone_have_no_bound_and_a_gradient() -> None:
    batch, model = make_batch([[[2]]], 3), editing_model()
    seed = next(s for s in range(99) if not len(noise(batch, DRAFTS, seed=s).path.row))
    terms = loss_terms(model, batch, noised=noise(batch, seed=seed), loss=LOSS, backend="tiles")
    assert float(terms["nelbo"].sum.detach()) == 0
    torch.stack([term.sum for term in terms.values()]).sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_rows_without_a_draft_cost_nothing_and_keep_every_head_in_the_loss() -> None:
    batch, model = make_batch([[[2]]], 3), editing_model()
    seed = next(s for s in range(99) if not len(noise(batch, DRAFTS, seed=s).drafts.row))
    terms = loss_terms(model, batch, noised=noise(batch, seed=seed), loss=LOSS, backend="tiles")
    assert float(terms["edit"].sum.detach()) == float(terms["complete"].sum.detach()) == 0
    torch.stack([terms[name].sum for name in ("edit", "complete")]).sum().backward()
    assert model.edit_head.weight.grad is not None  # another rank may have drafts
    assert count_terms(batch, LOSS)["edit"] == 2


def test_recall_and_calibration_by_hand() -> None:
    said = torch.log(torch.tensor([[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.3, 0.3, 0.4]]).double())
    truth = torch.eye(3).double()[[0, 1, 1]]
    expected, due = torch.tensor([[0.1, 0.6, 2.0]]), torch.tensor([[0.0, 0.0, 1.0]])
    counts = dict(zip(EDIT_COUNTS, watch_edits(said, truth, expected, due).tolist(), strict=True))
    whole = torch.tensor([True, False, True, False])
    probability = torch.tensor([0.95, 0.15, 0.55, 0.65])
    found = watch_complete(probability, whole).tolist()
    counts |= dict(zip(COMPLETE_COUNTS, found, strict=True))
    assert summary(counts) == pytest.approx(
        {
            "substitute_recall": 1 / 2,
            "substitute_precision": 1.0,
            "delete_precision": 0.0,
            "insert_recall": 1.0,
            "insert_precision": 1 / 2,
            "complete_share": 1 / 2,
            "complete_ece": (0.05 + 0.15 + 0.45 + 0.65) / 4,
            "complete_auroc": 3 / 4,
        }
    )
