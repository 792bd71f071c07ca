"""A model that teaches itself: from what it was, as it was kept, through every interruption."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from abf.diffusion.config import LossConfig, MaskedCorruption, UniformRate
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.guide import teach
from abf.diffusion.loss import block_charges
from abf.diffusion.regroup import regroup
from abf.errors import Interrupted, ResumeError
from abf.model.store import load_weights
from abf.train.config import BlockObjective
from abf.train.loop import TEACHER
from tests.diffusion.rows import V, make_batch, tiny_model
from tests.train.equality import assert_same_run
from tests.train.tiny_run import tiny_train

BATCH = make_batch([[[4, 7, 3, 6], [2, 5]], [[5, 1, 8], [3, 6, 2]]], 30)
LOSS = LossConfig(shift=False, clean_stream="block_causal", ar_weight=0, distil_weight=0.5)
TAUGHT: dict[str, Any] = {
    "objective": {
        "kind": "block",
        "corruption": {"kind": "masked", "law": {"kind": "uniform"}, "weight": "one"},
        "loss": {"shift": False, "clean_stream": "block_causal", "ar_weight": 0,
                 "distil_weight": 0.5},
        "distil_from": 0.4,
        "stages": [{"until": 0.4, "block_cap": 2}, {"until": 1.0}],
    }
}  # fmt: skip


def distilled(top: int, *, cap: int | None, same: bool) -> tuple[np.ndarray, np.ndarray]:
    """Charges of every masked slot, and the same by a full softmax over a plain pass each."""
    student = tiny_model(seed=1)
    teacher = student if same else tiny_model(seed=2)
    cfg = MaskedCorruption(law=UniformRate(), weight="one")
    epochs = np.zeros(2, dtype=np.int64)
    noised = build_corruption(cfg, mask_id=V).apply(BATCH, seed=0, epochs=epochs)
    small = regroup(BATCH, cap=cap, join=0, longest=8, seed=0, epochs=epochs)
    guide = teach(teacher, small, noised, loss=LOSS, backend="reference", top=top)
    with torch.no_grad():
        found = block_charges(
            student, BATCH, noised, loss=LOSS, backend="reference", terms=("distil",), guide=guide
        )["distil"]

    def said(model: Any, blocks: np.ndarray) -> np.ndarray:
        """Log-probabilities [R, V]: one row at a time, with a mask written out in full."""
        lines = []
        for row in range(len(BATCH.token_ids)):
            L = BATCH.token_ids.shape[1]
            ids = np.concatenate([noised.noisy_ids[row], BATCH.token_ids[row]])
            piece = np.tile(BATCH.document_id[row], 2)
            block, noisy = np.tile(blocks[row], 2), np.arange(2 * L) < L
            place = np.zeros(L, dtype=np.int64)
            for one in np.unique(BATCH.document_id[row]):
                here = BATCH.document_id[row] == one
                place[here] = np.arange(here.sum())
            same = (piece[:, None] == piece[None]) & (piece >= 0)[None]
            earlier, equal = block[None] < block[:, None], block[None] == block[:, None]
            sees = (
                np.where(
                    noisy[:, None],
                    (noisy[None] & equal) | (~noisy[None] & earlier),
                    ~noisy[None] & (earlier | equal),
                )
                & same
            )
            sees |= np.eye(2 * L, dtype=bool)
            mask = torch.from_numpy(sees)

            def attend(layer: int, q: Any, k: Any, v: Any, mask: Any = mask) -> torch.Tensor:
                return torch.nn.functional.scaled_dot_product_attention(
                    q, k, v, attn_mask=mask, enable_gqa=True
                )

            with torch.no_grad():
                states = model.hidden(
                    torch.from_numpy(ids)[None], torch.from_numpy(np.tile(place, 2))[None], attend
                )[0, :L]
            hidden = np.flatnonzero(noised.masked[row])
            logits = states[hidden] @ model.head_weight.detach().T
            lines.append(torch.log_softmax(logits, -1).numpy())
        return np.concatenate(lines)

    ours, theirs = said(student, BATCH.block_id), said(teacher, small.block_id)
    nats = []
    for mine, other in zip(ours, theirs, strict=True):
        best = np.argsort(-other)[:top]
        p = np.exp(other[best]) / np.exp(other[best]).sum()
        q = np.exp(mine[best]) / np.exp(mine[best]).sum()
        nats.append((p * np.log(p / q)).sum())
    return found.nll.numpy(), np.array(nats)


@pytest.mark.parametrize(("top", "cap"), [(4, 2), (16, 4), (V, None)])
def test_the_charge_is_the_divergence_on_the_teachers_tokens(top: int, cap: int | None) -> None:
    found, wanted = distilled(top, cap=cap, same=False)
    np.testing.assert_allclose(found, wanted, atol=1e-8)
    assert found.min() >= -1e-12
    assert found.max() > 0.01


def test_a_student_that_is_its_teacher_is_charged_nothing() -> None:
    found, _ = distilled(8, cap=None, same=True)
    assert np.abs(found).max() < 1e-12
    other, _ = distilled(8, cap=2, same=True)  # other blocks, other context
    assert other.max() > 1e-4


@pytest.mark.parametrize("at", [2, 4, 7])
def test_resume_is_bit_exact_with_a_teacher(
    tmp_path: Path, at: int, stop_at: Callable[..., Interrupted]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tiny_train(whole, TAUGHT)
    stop_at(at, parts, **TAUGHT)
    tiny_train(parts, TAUGHT)
    assert_same_run(whole, parts)
    one, other = (load_weights(path / TEACHER) for path in (whole, parts))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_without_its_teacher_a_run_does_not_go_on(
    tmp_path: Path, stop_at: Callable[..., Interrupted]
) -> None:
    stop_at(7, tmp_path, **TAUGHT)
    (tmp_path / TEACHER).unlink()
    with pytest.raises(ResumeError, match="step 4"):
        tiny_train(tmp_path, TAUGHT)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"distil_from": None}, "go together"),
        ({"loss": {}}, "go together"),
        ({"corruption": {"kind": "path"}, "stages": []}, "masks in their places"),
    ],
)
def test_half_a_teacher_is_refused(changes: dict[str, Any], words: str) -> None:
    settings = copy.deepcopy(TAUGHT["objective"]) | changes
    with pytest.raises(ValidationError, match=words):
        BlockObjective.model_validate(settings)
