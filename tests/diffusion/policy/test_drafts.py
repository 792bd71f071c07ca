"""Drafts: each kind of mistake is what it says, as often as it says, whatever the batch."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
import pytest

from abf.data.loader import PackedBatch
from abf.diffusion.config import DraftsConfig, PathCorruption
from abf.diffusion.corrupt.base import Blocks, build_corruption
from abf.diffusion.corrupt.path import PathNoised
from abf.diffusion.layout import block_starts
from tests.diffusion.rows import V, make_batch, take

BATCH = make_batch([[[4, 7, 3, 6], [2, 5]], [[5, 1, 8], [3, 6, 2]]], 30)
KINDS = ("right", "near", "cut", "overrun", "repeat", "shifted")


def drafts_of(batch: PackedBatch, *, seed: int = 0, share: float = 0.5, **kinds: Any) -> PathNoised:
    none: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    cfg = DraftsConfig.model_validate({"share": share, "masked": 0.0, **none, **kinds})
    corruption = build_corruption(PathCorruption(drafts=cfg), mask_id=V)
    return corruption.apply(batch, seed=seed, epochs=np.zeros(len(batch.token_ids), dtype=np.int64))


def pairs(noised: PathNoised) -> list[tuple[list[int], list[int]]]:
    """Draft and finished block of each draft."""
    found: Blocks = noised.drafts
    lines = zip(found.text, found.slots, found.clean, found.columns, strict=True)
    return [(t[:m].tolist(), c[:n].tolist()) for t, m, c, n in lines]


def many(**kinds: Any) -> list[tuple[list[int], list[int]]]:
    return [pair for seed in range(40) for pair in pairs(drafts_of(BATCH, seed=seed, **kinds))]


def edits(draft: list[int], finished: list[int]) -> int:
    """Levenshtein distance, row by row."""
    row = list(range(len(finished) + 1))
    for i, a in enumerate(draft):
        left, row[0] = row[0], i + 1
        for j, b in enumerate(finished):
            left, row[j + 1] = row[j + 1], min(row[j + 1] + 1, row[j] + 1, left + (a != b))
    return row[-1]


def is_subsequence(small: list[int], large: list[int]) -> bool:
    rest = iter(large)
    return all(token in rest for token in small)


def test_a_right_draft_is_its_block() -> None:
    assert all(draft == finished for draft, finished in many(right=1.0))


def test_a_near_draft_is_one_edit_away() -> None:
    distances = [edits(draft, finished) for draft, finished in many(near=1.0)]
    assert max(distances) == 1
    # A foreign token may happen to be the right one, a last block has nothing to run on into.
    assert 0.7 < np.mean(distances) < 1
    lengths = {len(draft) - len(finished) for draft, finished in many(near=1.0)}
    assert lengths == {-1, 0, 1}


def test_a_cut_draft_lacks_tokens_and_has_no_others() -> None:
    found = many(cut=1.0)
    assert all(is_subsequence(draft, finished) for draft, finished in found)
    long = [(draft, finished) for draft, finished in found if len(finished) > 3]
    prefix = [finished[: len(draft)] == draft for draft, finished in long]
    assert 0.4 < np.mean(prefix) < 0.95
    assert np.mean([len(draft) < len(finished) for draft, finished in long]) > 0.8


def test_an_overrun_goes_on_as_the_document_does() -> None:
    for seed in range(20):
        noised = drafts_of(BATCH, seed=seed, overrun=1.0)
        for k, (draft, finished) in enumerate(pairs(noised)):
            row, start = noised.drafts.row[k], noised.drafts.start[k]
            piece = BATCH.document_id[row] == BATCH.document_id[row, start]
            after = BATCH.token_ids[row][piece & (np.arange(30) >= start)].tolist()
            assert draft == after[: len(draft)]
            assert len(draft) >= len(finished)
            assert (len(draft) > len(finished)) == (len(after) > len(finished))


def test_a_repeat_says_an_ngram_twice() -> None:
    for draft, finished in many(repeat=1.0):
        more = len(draft) - len(finished)
        assert 1 <= more <= 4
        said = [
            finished[: j + more] + finished[j : j + more] + finished[j + more :]
            for j in range(len(finished) - more + 1)
        ]
        assert draft in said


def test_a_shifted_draft_starts_where_the_text_before_had_not_ended_or_too_late() -> None:
    said, lost, right = 0, 0, 0
    for seed in range(40):
        noised = drafts_of(BATCH, seed=seed, shifted=1.0)
        for k, (draft, finished) in enumerate(pairs(noised)):
            row, start = noised.drafts.row[k], noised.drafts.start[k]
            piece = np.flatnonzero(BATCH.document_id[row] == BATCH.document_id[row, start])
            text = BATCH.token_ids[row, piece[1] : start].tolist()  # no document token
            more = len(draft) - len(finished)
            if more > 0:
                assert more <= min(4, len(text))
                assert draft == text[-more:] + finished
                said += 1
            elif more < 0:
                assert draft == finished[-more:]
                assert draft
                lost += 1
            else:
                assert draft == finished
                assert not text or len(finished) == 1
                right += 1
    assert min(said, lost, right) > 20


def test_random_mistakes_are_as_many_as_the_rate_says() -> None:
    assert all(draft == finished for draft, finished in many(rate=0.0))
    found = many(rate=0.8)
    matcher = [difflib.SequenceMatcher(None, a, b, autojunk=False).ratio() for a, b in found]
    assert 0.4 < np.mean(matcher) < 0.9


def test_shares_of_kinds_and_of_drafts_are_met() -> None:
    kinds = {"right": 0.5, "cut": 0.5, "share": 0.25}
    noised = [drafts_of(BATCH, seed=seed, **kinds) for seed in range(400)]
    blocks = int(block_starts(BATCH).sum())
    share = sum(len(one.drafts.row) for one in noised) / (400 * blocks)
    assert share == pytest.approx(0.25, abs=0.02)
    assert all(len(one.drafts.row) + len(one.path.row) == blocks for one in noised)
    long = [pair for one in noised for pair in pairs(one) if len(pair[1]) > 4]
    assert np.mean([a == b for a, b in long]) == pytest.approx(0.55, abs=0.07)


def test_masks_hide_a_share_or_everything() -> None:
    found = many(right=1.0, masked=1.0, opened=0.5)
    masked = np.array([np.mean(np.array(draft) == V) for draft, _ in found if len(draft) > 5])
    assert 0.4 < (masked == 1).mean() < 0.7
    assert 0.3 < masked[masked < 1].mean() < 0.6


def test_fixed_length_cuts_and_pads() -> None:
    found = many(cut=0.5, overrun=0.5, fixed_length=True)
    assert all(len(draft) == len(finished) for draft, finished in found)
    assert any(V in draft for draft, _ in found)


@pytest.mark.parametrize("kind", [*KINDS, "mixed"])
def test_drafts_do_not_depend_on_the_batch(kind: str) -> None:
    """Other rows of a step are another rank's; the longest block of all may be there."""
    kinds = {} if kind == "mixed" else {kind: 1.0}
    for seed in range(20):
        whole = drafts_of(BATCH, seed=seed, masked=1.0, **kinds)
        for row in range(2):
            part = drafts_of(take(BATCH, [row]), seed=seed, masked=1.0, **kinds)
            lines = zip(pairs(whole), whole.drafts.row, strict=True)
            assert [pair for pair, at in lines if at == row] == pairs(part)


def before(noised: PathNoised, back: int) -> list[list[int] | None]:
    """Of each draft, the block that many before it in its document, by walking over the row."""
    found: list[list[int] | None] = []
    for row, start in zip(noised.drafts.row, noised.drafts.start, strict=True):
        blocks: list[list[int]] = []
        last = None
        for slot in range(start):
            if BATCH.document_id[row, slot] != BATCH.document_id[row, start]:
                continue
            if BATCH.block_id[row, slot] != last:
                blocks.append([])
            blocks[-1].append(int(BATCH.token_ids[row, slot]))
            last = BATCH.block_id[row, slot]
        blocks = blocks[1:]  # the document token is no block
        found.append(blocks[-back] if len(blocks) >= back else None)
    return found


@pytest.mark.parametrize("back", [1, 2])
def test_an_earlier_block_on_its_way_has_some_of_its_edits_done(back: int) -> None:
    """A text between two others on a shortest way: its distances add up to theirs. A mask that was
    inserted is an edit on either side."""
    untouched, between, masks = 0, 0, 0
    for seed in range(60):
        noised = drafts_of(BATCH, seed=seed, right=1.0, earlier=1.0, back=back)
        for (draft, finished), earlier in zip(pairs(noised), before(noised, back), strict=True):
            if earlier is None:
                assert draft == finished
                continue
            whole = edits(earlier, finished)
            assert edits(earlier, draft) + edits(draft, finished) == whole + draft.count(V)
            untouched += draft == earlier
            between += draft not in (earlier, finished)
            masks += V in draft
    assert 0.45 < untouched / (untouched + between) < 0.85
    assert masks > 5


def test_earlier_blocks_leave_the_other_drafts_what_they_are() -> None:
    """A block without an earlier one draws the kind that it would have drawn anyway."""
    kinds: dict[str, Any] = {"right": 0.2, "near": 0.3, "cut": 0.2, "repeat": 0.1, "masked": 0.0}
    plain, some = drafts_of(BATCH, **kinds), drafts_of(BATCH, **kinds, earlier=1.0, share=0.5)
    compared = 0
    for one, other, earlier in zip(pairs(plain), pairs(some), before(some, 2), strict=True):
        if earlier is None:
            assert one == other
            compared += 1
    assert compared > 2


def test_as_many_drafts_are_earlier_blocks_as_asked_for() -> None:
    counts = [0, 0]
    for seed in range(200):
        noised = drafts_of(BATCH, seed=seed, right=1.0, earlier=0.3, back=1)
        for (draft, finished), earlier in zip(pairs(noised), before(noised, 1), strict=True):
            counts[0] += earlier is not None and draft != finished
            counts[1] += earlier is not None
    # One in many on its way has arrived.
    assert 0.24 < counts[0] / counts[1] < 0.31


def test_earlier_blocks_do_not_depend_on_the_batch() -> None:
    kinds: dict[str, Any] = {"right": 1.0, "earlier": 0.8, "masked": 0.7, "back": 1, "share": 0.8}
    whole, part = drafts_of(BATCH, **kinds), drafts_of(take(BATCH, [1]), **kinds)
    mine = [pair for pair, row in zip(pairs(whole), whole.drafts.row, strict=True) if row == 1]
    assert mine == pairs(part)


def test_a_draft_of_its_own_starts_from_the_earlier_block() -> None:
    kinds: dict[str, Any] = {"right": 1.0, "earlier": 1.0, "back": 1}
    made, own = drafts_of(BATCH, **kinds), drafts_of(BATCH, **kinds, own=1.0)
    assert (own.own_steps > 0).all()
    for one, other, earlier in zip(pairs(made), pairs(own), before(own, 1), strict=True):
        if earlier is None:
            assert set(other[0]) == {V}
        else:
            assert one == other
