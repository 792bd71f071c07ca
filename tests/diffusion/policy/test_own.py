"""Drafts of the model's own: heads that are set by hand leave exactly one thing to write."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from abf.data.loader import PackedBatch
from abf.diffusion.config import DraftsConfig, LossConfig, PathCorruption
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.corrupt.path import PathNoised
from abf.diffusion.loss import loss_terms
from abf.diffusion.policy.own import MOST, write_own
from abf.model.transformer import EDITS, Transformer
from tests.diffusion.policy.test_charges import editing_model
from tests.diffusion.rows import V, make_batch, take

BATCH = make_batch([[[4, 7, 3, 6], [2, 5]], [[5, 1, 8], [3, 6, 2]]], 30)


def decided(**bias: float) -> Transformer:
    """A model that says of edits what is given and nothing else."""
    model = editing_model()
    with torch.no_grad():
        model.edit_head.weight.zero_()
        model.edit_head.bias.fill_(-20.0)
        for name, value in bias.items():
            model.edit_head.bias[EDITS.index(name)] = value
    return model


def written(
    model: Transformer, batch: PackedBatch = BATCH, *, own: float = 1.0, steps: int = 1
) -> tuple[PathNoised, PathNoised]:
    """Rows before and after."""
    cfg = PathCorruption(drafts=DraftsConfig(share=0.7, own=own, own_steps=steps))
    epochs = np.zeros(len(batch.token_ids), dtype=np.int64)
    before = build_corruption(cfg, mask_id=V).apply(batch, seed=5, epochs=epochs)
    loss = LossConfig(edit_weight=1.0)
    after = write_own(model, batch, before, loss=loss, backend="reference", seed=5, epochs=epochs)
    return before, after


def texts(noised: PathNoised) -> list[list[int]]:
    drafts = noised.drafts
    return [t[:m].tolist() for t, m in zip(drafts.text, drafts.slots, strict=True)]


def test_a_draft_of_its_own_starts_from_masks_about_as_many_as_tokens() -> None:
    before, _ = written(decided())
    assert all(set(text) == {V} for text in texts(before))
    off = before.drafts.slots / before.drafts.columns
    assert ((off >= 0.5) & (off <= 1.5)).all()
    assert off.std() > 0


def test_masks_are_filled_half_of_them_at_a_step() -> None:
    before, after = written(decided())
    held = [token for text in texts(after) for token in text]
    assert len(held) == sum(map(len, texts(before)))
    assert 0.25 < np.mean(np.array(held) == V) < 0.75


def test_what_is_to_be_deleted_goes_but_not_all_of_a_block() -> None:
    before, after = written(decided(delete=20.0))
    assert {len(text) for text in texts(after)} == {1}
    assert max(map(len, texts(before))) > 1
    # What is left of a row is laid out as ever: each block, and its end.
    for k, (row, first) in enumerate(zip(after.drafts.row, after.drafts.first, strict=True)):
        assert after.noisy_ids[row, first + 1] == V + 1
        assert after.block_start[row, first] == after.drafts.start[k]


def test_masks_that_could_stand_for_what_is_missing_count_for_it() -> None:
    """Each mask is as likely one too many as not, so a group that misses a little more gets more,
    and loses none."""
    model = decided(delete=0.0, missing=float(np.log(np.expm1(0.6))))
    before, after = written(model)
    for old, new in zip(texts(before), texts(after), strict=True):
        n = len(old)
        need = 0.6 * (n + 1) - 0.5 * n
        assert len(new) == min(n + min(int(need + 0.5), MOST), model.max_block)


def test_masks_are_inserted_as_expected_missing_and_while_there_is_room() -> None:
    model = decided(missing=float(np.log(np.expm1(0.3))))
    before, after = written(model)
    # All slots are masks: one group, whose gaps add up.
    for old, new in zip(texts(before), texts(after), strict=True):
        added = min(round(0.3 * (len(old) + 1)), MOST, model.max_block - len(old))
        assert len(new) == len(old) + max(added, 0)
    full = decided(missing=20.0)
    _, after = written(full, steps=8)
    assert after.drafts.slots.max() <= full.max_block


def test_visible_tokens_are_revised_only_where_a_gate_says_so() -> None:
    _, first = written(decided(), steps=1)
    _, later = written(decided(), steps=4)
    fixed = sum(
        a[i] not in (V, b[i])
        for a, b in zip(texts(first), texts(later), strict=True)
        for i in range(len(a))
    )
    assert fixed == 0
    assert sum(t.count(V) for t in texts(later)) < sum(t.count(V) for t in texts(first))
    _, revised = written(decided(revise=20.0), steps=4)
    kept = [
        a[i] == b[i]
        for a, b in zip(texts(first), texts(revised), strict=True)
        for i in range(len(a))
        if a[i] != V
    ]
    assert not all(kept)


def test_others_stay_and_nothing_depends_on_the_batch() -> None:
    model = editing_model()
    before, after = written(model, own=0.5, steps=3)
    own = before.own_steps > 0
    assert own.any()
    assert not own.all()
    same = [a == b for a, b in zip(texts(before), texts(after), strict=True)]
    assert all(s for s, mine in zip(same, own, strict=True) if not mine)
    assert (after.path.text == before.path.text).all()
    _, alone = written(model, take(BATCH, [1]), own=0.5, steps=3)
    rows = after.drafts.row == 1
    assert [t for t, mine in zip(texts(after), rows, strict=True) if mine] == texts(alone)
    for blocks in (after.path, after.drafts):
        for k, (row, first, slots) in enumerate(
            zip(blocks.row, blocks.first, blocks.slots, strict=True)
        ):
            found = after.noisy_ids[row, first : first + slots + 1].tolist()
            assert found == [*blocks.text[k, :slots], V + 1]


@pytest.mark.parametrize("own", [0.0, 1.0])
def test_writing_takes_no_gradient_from_training(own: float) -> None:
    """A pass without gradients under autocast must not leave cast weights behind."""
    model = editing_model().float()
    with torch.autocast("cpu", torch.bfloat16):
        _, noised = written(model, own=own)
    with torch.autocast("cpu", torch.bfloat16):
        terms = loss_terms(
            model, BATCH, noised=noised, loss=LossConfig(edit_weight=1.0), backend="tiles"
        )
        torch.stack([term.sum for term in terms.values()]).sum().backward()
    weights = [p for name, p in model.named_parameters() if name.endswith("weight")]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in weights)
