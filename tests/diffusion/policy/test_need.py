"""What groups need, against a slow reading of the rule, and the sampler against own drafts."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abf.decode.config import AbfStrategy
from abf.decode.observe import Limits, block_view
from abf.decode.request import Prompt, RequestState
from abf.decode.sampler import Proposals
from abf.decode.strategy.abf import Abf
from abf.decode.trace import TraceWriter
from abf.diffusion.policy.gates import EDITS, read_gates
from abf.diffusion.policy.need import one_block
from abf.diffusion.policy.own import BAR, MOST, needed

V = 50


def slowly(
    missing: Any, delete: Any, is_mask: Any, bar: float, most: int
) -> tuple[list[bool], list[int]]:
    """Slots out and masks in of one block, group by group, in the words of docs/method.md."""
    gaps, masks, number = defaultdict(list), defaultdict(list), 0
    for i in range(len(missing)):
        gaps[number].append(i)
        if i < len(is_mask) and is_mask[i]:
            masks[number].append(i)
        else:
            number += 1
    need = {
        g: sum(float(missing[i]) for i in gaps[g]) - sum(float(delete[i]) for i in masks[g])
        for g in gaps
    }
    out = [not m and d >= bar for m, d in zip(is_mask, delete, strict=True)]
    for g, members in masks.items():
        if -need[g] >= bar:
            many = max(1, int(-need[g] + 0.5))
            likely = sorted(members, key=lambda i: -delete[i])[:many]
            for i in likely:
                out[i] = delete[i] >= bar
    if out and all(out):
        out[int(np.argmin(delete))] = False
    left = max(1, int(sum(max(0.0, n) for n in need.values()) + 0.5))
    add = [0] * len(missing)
    for g in sorted(need, key=lambda g: -need[g]):
        if need[g] >= bar:
            gap = max(gaps[g], key=lambda i: missing[i])
            add[gap] = min(left, max(1, min(most, int(need[g] + 0.5))))
            left -= add[gap]
    return out, add


def drawn(K: int, m: int, *, seed: int) -> tuple[torch.Tensor, np.ndarray, np.ndarray]:
    """Edit heads [K, m+1, E], masks [K, m] and slots [K] of random drafts, an empty one too."""
    rng = np.random.default_rng(seed)
    slots = rng.integers(1, m + 1, size=K)
    slots[0] = 0
    is_mask = (rng.random((K, m)) < rng.random((K, 1))) & (np.arange(m) < slots[:, None])
    edits = rng.normal(size=(K, m + 1, len(EDITS))) * rng.exponential(size=(K, 1, 1)) * 2
    return torch.tensor(edits, dtype=torch.float32), is_mask, slots


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_is_the_one_that_is_written_down(seed: int) -> None:
    edits, is_mask, slots = drawn(60, 9, seed=seed)
    some = [0, 0]
    for raw, mask, n in zip(edits, is_mask, slots.tolist(), strict=True):
        gates = read_gates(raw[: n + 1], torch.tensor(mask[:n]))
        told = gates.missing.numpy(), gates.delete.exp().numpy(), mask[:n]
        places = one_block(*told)
        out, add = places.deletions(bar=0.5)[:-1], places.insertions(bar=0.4, most=3)
        assert (out.tolist(), slowly(*told, 0.4, 3)[1]) == (slowly(*told, 0.5, 3)[0], add.tolist())
        some = [some[0] + out.sum(), some[1] + add.sum()]
    assert min(some) > 20, "random blocks must need something to prove much"


@pytest.mark.parametrize("seed", range(4))
def test_a_draft_of_its_own_needs_what_the_sampler_gives(seed: int, tmp_path: Path) -> None:
    """All drafts at once, and each alone as a request's block."""
    edits, is_mask, slots = drawn(60, 9, seed=seed)
    remove, insert = needed(read_gates(edits, torch.tensor(is_mask)), is_mask, slots)
    strategy = Abf(AbfStrategy(delete=BAR, insert=BAR, max_insert=MOST))
    trace = TraceWriter(tmp_path / "log", {"mask_id": str(V), "document_id": "0", "requests": "1"})
    for k, n in enumerate(slots.tolist()):
        if not n:  # no request ever has an empty block, but a strategy with a clock
            assert not remove[k].any()
            continue
        state = RequestState(Prompt(0, "0", np.array([5])), 200, V, 0, trace)
        state.context()
        held = np.arange(n)[~is_mask[k, :n]]
        state.open(n, (held, np.full(len(held), 7)), lock=False)
        proposals = Proposals(
            np.full(n, 3, np.int32), np.full(n, 0.1, np.float32), np.zeros(n, np.float32),
            np.full((n, 1), 3, np.int32), np.full((n, 1), 0.1, np.float32),
        )  # fmt: skip
        view = block_view(
            state, np.arange(n), proposals, limits=Limits(50, 100, 3), edits=edits[k, : n + 1]
        )
        assert view.edit is not None
        action = strategy.decide(view, None)
        gap_uids = view.edit.gap_uids.tolist()
        add = dict(zip(action.insert.uids.tolist(), action.insert.counts.tolist(), strict=True))
        assert insert[k, : n + 1].tolist() == [add.get(uid, 0) for uid in gap_uids]
        assert remove[k, :n].tolist() == np.isin(view.uids, action.delete).tolist()
        assert not remove[k, n:].any()
        assert not insert[k, n + 1 :].any()
