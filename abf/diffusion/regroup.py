"""Blocks of another granularity than the packed one: cut to a cap, or joined at random.

A curriculum of block lengths trains on the packed rows themselves: a cap cuts a block at multiples
of it, counted from the block's start, so that the blocks of cap 4 are parts of those of cap 8 when
these are nested (powers of two), and of the packed ones in any case. Blocks that were cut for one
step are whole again at the next cap: adjacent pieces merge, as in BARD (arXiv 2604.16514) and
NBDiff (arXiv 2512.06776), and at semantic boundaries here. Random joining lets one model meet
several granularities. Nothing crosses a document, and its opening token stays apart.

A granularity T is a mean block length that is drawn for a document whatever its text, so that
telling it gives nothing of the text away. Blocks of mean length m are then joined to the one before
with probability 1 - m/T, which makes runs of T/m blocks on average.

Block dropout takes what lies before them from blocks, noisy and clean, but for the first tokens of
a piece, so that a model learns to do without it (arXiv 2605.15913).

Letters: B batch rows, L row length.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from abf.data.loader import PackedBatch
from abf.diffusion.config import GranularityConfig, HistoryConfig
from abf.diffusion.layout import positions, run_starts
from abf.diffusion.rng import uniform

_JOIN, _LENGTH, _TOLD, _DROP = 32, 33, 34, 35
"""Substreams of random numbers: which blocks join, which granularity, who is told, who forgets."""


def regroup(
    batch: PackedBatch,
    *,
    cap: int | None,
    join: float,
    longest: int,
    seed: int,
    epochs: NDArray[np.int64],
    granularity: GranularityConfig | None = None,
    known: tuple[int, ...] = (),
) -> PackedBatch:
    """The same tokens in other blocks.

    Args:
        batch: packed rows.
        cap: longest block, in tokens; None leaves blocks whole.
        join: probability that a block is joined to the one before it, as long as both together have
            at most `longest` tokens.
        longest: see `join`.
        seed: of the run.
        epochs: [B] how often each row has been seen before.
        granularity: draws the probability of joining document by document, instead of `join`.
        known: granularities of the model, ascending; `lengths` are among them.
    """
    if batch.granularity is not None:
        batch = dataclasses.replace(batch, granularity=None)
    if cap is None and not join and granularity is None:
        return batch
    L = batch.block_id.shape[1]
    begins = run_starts(batch.block_id)
    inside = np.arange(L) - begins
    place = positions(batch.document_id)
    first = inside == 0
    if cap is not None:
        first |= inside % cap == 0
    told, joins = None, np.float64(join)
    if granularity is not None:
        length, told = _drawn(batch, granularity, known, seed=seed, epochs=epochs)
        joins = 1 - _mean_length(batch, first, place) / length
    if granularity is not None or join:
        keys = (seed, epochs)
        first &= ~_joined(batch, first, place, joins=joins, longest=longest, keys=keys)
    block_id = np.where(batch.document_id >= 0, first.cumsum(axis=1) - 1, -1)
    return dataclasses.replace(batch, block_id=block_id, granularity=told)


def drop_history(
    batch: PackedBatch, cfg: HistoryConfig | None, *, seed: int, epochs: NDArray[np.int64]
) -> PackedBatch:
    """The same blocks, of which some lose what lies before them; None: none does.

    Args:
        batch: packed rows, in the blocks to train.
        cfg: how many, and what they keep.
        seed: of the run.
        epochs: [B] how often each row has been seen before.
    """
    if cfg is None:
        return dataclasses.replace(batch, dropped=None, sinks=0)
    epoch = np.asarray(epochs, dtype=np.int64)[:, None]
    begins = np.take_along_axis(positions(batch.document_id), run_starts(batch.block_id), axis=1)
    drawn = uniform(seed, _DROP, epoch, batch.document_id, begins) < cfg.dropout
    return dataclasses.replace(batch, dropped=drawn & (batch.document_id >= 0), sinks=cfg.sinks)


def _drawn(
    batch: PackedBatch,
    cfg: GranularityConfig,
    known: tuple[int, ...],
    *,
    seed: int,
    epochs: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """[B, L] granularity of each slot's document, and its number in `known` or -1: not told."""
    assert set(cfg.lengths) <= set(known), (cfg.lengths, known)
    epoch = np.asarray(epochs, dtype=np.int64)[:, None]
    choice, told = (uniform(seed, stream, epoch, batch.document_id) for stream in (_LENGTH, _TOLD))
    length = np.array(cfg.lengths)[(choice * len(cfg.lengths)).astype(np.int64)]
    number = np.searchsorted(np.array(known), length)
    return length, np.where((told < cfg.told) & (batch.document_id >= 0), number, -1)


def _mean_length(
    batch: PackedBatch, first: NDArray[np.bool_], place: NDArray[np.int64]
) -> NDArray[np.float64]:
    """[B, L] mean length of the blocks of each slot's piece, its opening token left out."""
    L = first.shape[1]
    piece = run_starts(batch.document_id) + L * np.arange(len(first))[:, None]
    tokens, blocks = (
        np.bincount(piece.ravel(), counted.ravel(), minlength=first.size)[piece]
        for counted in (place > 0, first & (place > 0))
    )
    return tokens / np.maximum(blocks, 1)


def _joined(
    batch: PackedBatch,
    first: NDArray[np.bool_],
    place: NDArray[np.int64],
    *,
    joins: NDArray[np.float64] | np.float64,
    longest: int,
    keys: tuple[int, NDArray[np.int64]],
) -> NDArray[np.bool_]:
    """[B, L] first slots of blocks that become part of the block before them.

    Args:
        joins: probability, of every slot or of each [B, L].
        keys: seed and epochs.
    """
    L = first.shape[1]
    seed, epochs = keys
    epoch = np.broadcast_to(np.asarray(epochs, dtype=np.int64)[:, None], first.shape)
    asked = uniform(seed, _JOIN, epoch, batch.document_id, place) < joins
    # The first block of a document has its opening token before it.
    asked &= first & (place > 1)
    found = np.zeros_like(first)
    for row, wanted in enumerate(asked):
        starts = np.flatnonzero(first[row])
        ends = np.append(starts[1:], L)
        held = 0  # tokens of the block being built
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            if wanted[start] and held + end - start <= longest:
                found[row, start] = True
                held += end - start
            else:
                held = end - start
    return found
