"""Drafts of the model's own: what its sampler would have made of a few masks, to learn to mend.

A plain version of the sampler, all drafts at once and without a log: each step fills every MASK
that is sure and half of the others with a token drawn from the model, replaces and deletes tokens
where a gate says so, and inserts as many masks as are needed (`abf.diffusion.policy.need`). No
gradient.
Source: notes/method.md §E4 (v); LLaDA 2.1 and 2.2 train on drafts of their own as well.

Letters: B batch rows, K drafts, m slots of the longest, R slots of all, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol

import numpy as np
import torch
from abf_kernels.block_attention.api import Backend
from numpy.typing import NDArray
from torch import Tensor

from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig
from abf.diffusion.corrupt.base import Blocks, lay_out, squeeze
from abf.diffusion.corrupt.path import PathNoised
from abf.diffusion.device import on_its_device
from abf.diffusion.layout import block_reads, two_stream
from abf.diffusion.needed import Layers, read_states
from abf.diffusion.policy.gates import Gates, read_gates
from abf.diffusion.policy.need import Places
from abf.diffusion.rng import uniform

SURE = 0.9
"""Probability from which a MASK is filled whatever the others are."""
BAR = 0.5
"""Probability of a gate, and need of a group, from which it is acted upon."""
MOST = 4
"""Masks inserted in a gap at a step, at most."""
_TOKEN, _FILL = 40, 41
"""Substreams of random numbers."""


class Writer(Layers, Protocol):
    """What is asked of the model."""

    def logits(self, hidden: Tensor) -> Tensor: ...

    def edits(self, hidden: Tensor) -> Tensor: ...

    @property
    def head_weight(self) -> Tensor: ...

    @property
    def mask_id(self) -> int: ...

    @property
    def max_block(self) -> int: ...


@torch.no_grad()
@on_its_device
def write_own(
    model: Writer,
    batch: PackedBatch,
    noised: PathNoised,
    *,
    loss: LossConfig,
    backend: Backend,
    seed: int,
    epochs: NDArray[np.int64],
) -> PathNoised:
    """The same rows, with the drafts that are the model's to write as it leaves them.

    Passes are made for the most steps that any draft could have, whatever was drawn: ranks that
    share weights must meet in each of them.

    Args:
        model: the writer.
        batch: clean rows.
        noised: with masks where a draft is to be written.
        loss: says where tokens are read and what the clean stream sees.
        backend: attention back end.
        seed: of the run.
        epochs: [B] how often each row has been seen before.
    """
    for step in range(noised.most_steps):
        mine = noised.own_steps > step
        drafts = noised.drafts.take(mine)
        streams = two_stream(batch, noised, clean_stream=loss.clean_stream)
        reads = block_reads(
            drafts, noisy=streams.noisy, L=batch.token_ids.shape[1], shift=loss.shift
        )
        states = read_states(model, streams, reads.rows, backend=backend)
        K, m = drafts.text.shape
        edits = model.edits(states[len(reads.token) :]).unflatten(0, (K, m + 1))
        piece = batch.document_id[drafts.row, drafts.start]
        keys = (seed, epochs[drafts.row], piece, drafts.start, step)
        text, slots = _step(model, states[: len(reads.token)], reads, drafts, edits, keys)
        noised = _rewritten(noised, mine, text, slots, rows=len(batch.token_ids))
    return noised


def _step(
    model: Writer, states: Tensor, reads: Any, drafts: Blocks, edits: Tensor, keys: tuple[Any, ...]
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Text [K, m'] and slots [K] of the drafts after one step."""
    K, m = drafts.text.shape
    exists = np.arange(m) < drafts.slots[:, None]
    is_mask = (drafts.text == model.mask_id) & exists
    gates = read_gates(edits, torch.as_tensor(is_mask))
    revise = exists & (gates.revise.exp() >= BAR).cpu().numpy()
    remove, wanted = needed(gates, is_mask, drafts.slots)

    block, slot = reads.block.cpu().numpy(), reads.slot.cpu().numpy()
    spread = [np.asarray(key)[block] if np.ndim(key) else key for key in keys]
    drawn, sure = _draw(model, states, uniform(*spread, _TOKEN, slot))
    token, confident = np.zeros((K, m), dtype=np.int64), np.zeros((K, m), dtype=bool)
    token[block, slot], confident[block, slot] = drawn, sure >= SURE
    chance = np.ones((K, m))
    chance[block, slot] = uniform(*spread, _FILL, slot)
    changed = revise | (is_mask & (confident | (chance < 0.5)))
    text = np.where(changed, token, drafts.text)

    kept = (exists & ~remove).sum(axis=1)
    room = np.maximum(model.max_block - kept, 0)[:, None]
    wanted = np.clip(room - (wanted.cumsum(axis=1) - wanted), 0, wanted)

    added = np.full((K, m + 1, MOST), model.mask_id)
    there = np.arange(MOST) < wanted[..., None]
    cells = np.concatenate([added[:, :m], text[..., None]], axis=2).reshape(K, m * (MOST + 1))
    present = np.concatenate([there[:, :m], (exists & ~remove)[..., None]], axis=2).reshape(
        K, m * (MOST + 1)
    )
    return squeeze(
        np.concatenate([cells, added[:, m]], axis=1),
        np.concatenate([present, there[:, m]], axis=1),
        empty=model.mask_id,
    )


def needed(
    gates: Gates, is_mask: NDArray[np.bool_], slots: NDArray[np.int64]
) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    """What the sampler would do: slots to take out [K, m], masks to put into each gap [K, m+1].

    Args:
        gates: of the drafts; what they say behind a draft's end is not looked at.
        is_mask: [K, m]
        slots: [K] slots of each draft.
    """
    K, m = is_mask.shape
    place = np.arange(m + 1)
    there, is_end = place <= slots[:, None], place == slots[:, None]
    missing, delete = gates.missing.float().cpu().numpy(), gates.delete.exp().float().cpu().numpy()
    delete, is_mask = (np.pad(values, ((0, 0), (0, 1))) for values in (delete, is_mask))
    delete = np.where(is_end, 0.0, delete)
    places = Places(missing[there], delete[there], is_mask[there], is_end[there])
    remove, insert = np.zeros((K, m + 1), dtype=bool), np.zeros((K, m + 1), dtype=np.intp)
    remove[there] = places.deletions(bar=BAR)
    insert[there] = places.insertions(bar=BAR, most=MOST)
    return remove[:, :m], insert


def _draw(
    model: Writer, states: Tensor, uniforms: NDArray[np.float64]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """A token drawn for each of R states, and its probability."""
    tokens, sure = np.zeros(len(states), dtype=np.int64), np.zeros(len(states))
    size = 512  # rows whose probabilities are held at once
    for start in range(0, len(states), size):
        probs = torch.softmax(model.logits(states[start : start + size]).double(), dim=-1)
        cumulative = probs.cumsum(dim=-1)
        point = torch.as_tensor(uniforms[start : start + size])[:, None] * cumulative[:, -1:]
        found = torch.searchsorted(cumulative, point, right=True).clamp(max=probs.shape[1] - 1)
        tokens[start : start + size] = found[:, 0].cpu().numpy()
        sure[start : start + size] = probs.gather(1, found)[:, 0].cpu().numpy()
    return tokens, sure


def _rewritten(
    noised: PathNoised,
    mine: NDArray[np.bool_],
    text: NDArray[np.int64],
    slots: NDArray[np.int64],
    *,
    rows: int,
) -> PathNoised:
    """Rows laid out again with the new texts of some drafts."""
    mask_id, drafts, path = noised.law.vocab, noised.drafts, noised.path
    width = max(text.shape[1], drafts.text.shape[1], path.text.shape[1])

    def wide(values: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=mask_id)

    texts, counts = wide(drafts.text), drafts.slots.copy()
    texts[mine], counts[mine] = wide(text), slots
    row = np.concatenate([path.row, drafts.row])
    start = np.concatenate([path.start, drafts.start])
    every, count = np.concatenate([wide(path.text), texts]), np.concatenate([path.slots, counts])
    order = np.lexsort((start, row))
    noisy_ids, block_start, first = lay_out(
        row[order], start[order], every[order], count[order], rows=rows, end_id=mask_id + 1
    )
    place = np.empty_like(first)
    place[order] = first
    split = len(path.row)
    return dataclasses.replace(
        noised,
        noisy_ids=noisy_ids,
        block_start=block_start,
        path=dataclasses.replace(path, first=place[:split]),
        drafts=dataclasses.replace(
            drafts, first=place[split:], text=texts[:, : max(1, int(counts.max(initial=0)))],
            slots=counts,
        ),
    )  # fmt: skip
