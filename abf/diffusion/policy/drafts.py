"""Drafts: finished blocks with mistakes such as a sampler makes, to learn edits from.

Kinds: right already; one edit away; cut short or a span missing; running on into the next block; an
n-gram said twice; begun at a wrong cut; tokens dropped, replaced and added at random; an earlier
block of the document on its way to this one. In some of each kind tokens are masked, in some of
these all of them (a block just opened with a wrong length). What a draft needs is found
afterwards by alignment (`abf.diffusion.policy.align`).
Source: notes/method.md §E4; over-runs, truncations, wrong cuts and earlier blocks are this
project's.

Letters: K blocks, n columns (finished tokens) and m slots of the longest, C cells: the tokens and
what may be put between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from abf.diffusion.config import DraftsConfig
from abf.diffusion.policy.align import align
from abf.diffusion.rng import uniform

GRAM, OVERRUN = 4, 8
"""Longest n-gram said again; most tokens of the next block, or lost at the beginning. Tokens."""
(_OWN, _STEPS, _OPENED) = range(12, 15)
(_KIND, _AMOUNT, _PLACE, _CHOICE, _DROP, _REPLACE, _ADD, _FOREIGN, _ID, _MASKED, _LEVEL, _HIDE) = (
    range(16, 28)
)
_HIDE_BEYOND = 28
_DONE, _SLOT, _COLUMN, _SHOWN = range(29, 33)
"""Substreams of random numbers."""


Keys = tuple[NDArray[np.int64] | int, ...]
"""Counters, [K] or one for all, that random numbers are a function of."""


@dataclass
class Finished:
    """Blocks as they should be, and what a mistake may be made of."""

    clean: NDArray[np.int64]
    """[K, n] tokens."""
    columns: NDArray[np.int64]
    """[K] how many of them."""
    following: NDArray[np.int64]
    """[K, OVERRUN] first tokens of the same document's next block."""
    follows: NDArray[np.int64]
    """[K] how many of them there are."""
    preceding: NDArray[np.int64]
    """[K, GRAM] last tokens of the same document before the block, the nearest last."""
    precedes: NDArray[np.int64]
    """[K] how many of them there are."""
    nearby: NDArray[np.int64]
    """[K, P] tokens of the same row, any of which may be taken for another."""
    earlier: NDArray[np.int64]
    """[K] number of the block `back` blocks before in the same document, or -1."""


def draft(
    finished: Finished, cfg: DraftsConfig, *, keys: Keys, vocab: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_], NDArray[np.bool_]]:
    """One draft of each block.

    Args:
        finished: the blocks.
        cfg: how often which mistake.
        keys: counters [K] that the random numbers are a function of.
        vocab: V; MASK is V.

    Returns:
        cells [K, C] tokens and MASKs, which of them are there, and which drafts began as an earlier
        block [K].
    """
    clean, columns = finished.clean, finished.columns
    K, n = clean.shape
    column, gap = np.arange(n), np.arange(n + 1)
    real = column < columns[:, None]
    longest = np.maximum(columns, 1)

    def one(stream: int) -> NDArray[np.float64]:
        """[K] random numbers."""
        return uniform(*keys, stream)

    def many(stream: int, width: int) -> NDArray[np.float64]:
        """[K, width] random numbers."""
        spread = [np.asarray(key).reshape(-1, 1) for key in keys]
        return uniform(*spread, stream, np.arange(width)[None, :])

    def foreign(width: int) -> NDArray[np.int64]:
        """[K, width] tokens from anywhere: half of the vocabulary, half of the same row."""
        u, place = many(_FOREIGN, width), many(_ID, width)
        near = (place * finished.nearby.shape[1]).astype(np.int64)
        near_ids = np.take_along_axis(finished.nearby, near, axis=1)
        return np.where(u < 0.5, (place * vocab).astype(np.int64), near_ids)

    edges = np.cumsum([cfg.right, cfg.near, cfg.cut, cfg.overrun, cfg.repeat, cfg.shifted])
    drawn, share = one(_KIND), cfg.earlier
    revised = drawn < share
    drawn = np.where(revised, drawn / (share or 1), (drawn - share) / ((1 - share) or 1))
    revised &= finished.earlier >= 0
    kind = (drawn[:, None] >= edges).sum(axis=1)
    amount, place, choice = one(_AMOUNT), one(_PLACE), one(_CHOICE)
    there, added = real.copy(), np.zeros((K, n + 1), dtype=np.int64)
    replaced = np.zeros((K, n), dtype=bool)
    spurious = foreign((n + 1) * GRAM).reshape(K, n + 1, GRAM)
    beyond = np.zeros(K, dtype=np.int64)

    near = kind == 1
    edit = (choice * 5).astype(np.int64)
    at = (place * longest).astype(np.int64)
    hit = column == at[:, None]
    there &= ~((near & (edit == 0))[:, None] & hit)
    added += (near & (edit == 1))[:, None] & (gap == (place * (longest + 1)).astype(int)[:, None])
    replaced |= (near & (edit == 2))[:, None] & hit
    there &= ~((near & (edit == 3))[:, None] & (column == columns[:, None] - 1))
    beyond += near & (edit == 4)

    cut = kind == 2
    kept = 1 + (amount * (longest - 1)).astype(np.int64)
    there &= ~((cut & (choice < 0.5))[:, None] & (column >= kept[:, None]))
    low, high = (np.sort([amount * longest, place * longest], axis=0)).astype(np.int64)
    inside = (column >= low[:, None]) & (column <= high[:, None])
    there &= ~((cut & (choice >= 0.5))[:, None] & inside)

    beyond += np.where(kind == 3, 1 + (amount * OVERRUN).astype(np.int64), 0)
    beyond = np.minimum(beyond, finished.follows)

    gram = np.minimum(1 + (amount * GRAM).astype(np.int64), longest)
    ends = gram + (place * (longest - gram + 1)).astype(np.int64)  # the gap behind the n-gram
    again = (kind == 4)[:, None] & (gap == ends[:, None])
    added += again * gram[:, None]
    source = np.clip((ends - gram)[:, None] + np.arange(GRAM), 0, n - 1)
    said = np.take_along_axis(clean, source, axis=1)
    spurious = np.where(again[..., None], said[:, None, :], spurious)

    shifted = kind == 5
    early = np.where(shifted & (choice < 0.5), 1 + (amount * GRAM).astype(np.int64), 0)
    early = np.minimum(early, finished.precedes)
    added[:, 0] += early
    source = np.clip(GRAM - early[:, None] + np.arange(GRAM), 0, GRAM - 1)
    before = np.take_along_axis(finished.preceding, source, axis=1)
    spurious[:, 0] = np.where((early > 0)[:, None], before, spurious[:, 0])
    lost = np.minimum(1 + (amount * OVERRUN).astype(np.int64), longest - 1)
    there &= ~((shifted & (choice >= 0.5))[:, None] & (column < lost[:, None]))

    mixed = (kind == 6)[:, None]
    most = cfg.rate * np.stack([amount, place, choice])[..., None]
    there &= ~(mixed & (many(_DROP, n) < most[0]))
    replaced |= mixed & (many(_REPLACE, n) < most[1])
    added += mixed & (many(_ADD, n + 1) < most[2]) & (gap <= columns[:, None])

    # Cells: before each column and at the end, what is added; then the next block's tokens.
    shown = np.where(replaced, foreign(n), clean)
    extra = np.arange(GRAM) < added[..., None]
    tokens = np.concatenate([spurious[:, :n], shown[..., None]], axis=2).reshape(K, n * (GRAM + 1))
    cells = np.concatenate([tokens, spurious[:, n], finished.following], axis=1)
    present = np.concatenate([extra[:, :n], there[..., None]], axis=2).reshape(K, n * (GRAM + 1))
    runs_on = np.arange(OVERRUN) < beyond[:, None]
    present = np.concatenate([present, extra[:, n], runs_on], axis=1)
    if revised.any():
        chosen = np.flatnonzero(revised)
        edited = many(_SLOT, n)[chosen], many(_COLUMN, n)[chosen]
        way = _on_the_way(
            finished, chosen, one(_DONE)[chosen], edited, many(_SHOWN, n)[chosen], mask_id=vocab
        )
        present[chosen] = False
        # Cells of a draft that is made here are five a token and more: these fit in.
        cells[chosen, : 2 * n], present[chosen, : 2 * n] = way

    level = one(_LEVEL)
    hidden = np.where(level < cfg.opened, 1.0, (level - cfg.opened) / (1 - cfg.opened))
    # Numbers of their own for what runs on: it lies behind the longest block of the batch, and a
    # draft must not depend on the blocks beside it.
    chance = many(_HIDE, cells.shape[1] - OVERRUN), many(_HIDE_BEYOND, OVERRUN)
    hide = (one(_MASKED) < cfg.masked)[:, None] & (np.concatenate(chance, 1) < hidden[:, None])
    return np.where(hide, vocab, cells), present, revised


def _on_the_way(
    finished: Finished,
    chosen: NDArray[np.intp],
    share: NDArray[np.float64],
    edited: tuple[NDArray[np.float64], NDArray[np.float64]],
    inserted: NDArray[np.float64],
    *,
    mask_id: int,
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Earlier blocks, each with some of the edits done that make it the block.

    In half of them none is done, in the others each with a probability that is uniform. Half of
    what is inserted is a MASK, as in the sampler.

    Args:
        finished: the blocks.
        chosen: [R] which of them; each has an earlier one.
        share: [R] random numbers: how much is done.
        edited: [R, n] each, random numbers: which slots of the earlier block are done, and which
            columns of the block.
        inserted: [R, n] random numbers: which inserted tokens are MASKs.
        mask_id: id of MASK.

    Returns:
        cells [R, 2n], and which of them are there.
    """
    before = finished.earlier[chosen]
    clean, columns = finished.clean[chosen], finished.columns[chosen]
    text, slots = finished.clean[before], finished.columns[before]
    found = align(clean, columns, text, slots, mask_id=mask_id)
    column = np.arange(clean.shape[1])
    stands, exists = found.column >= 0, column < slots[:, None]
    bar = np.maximum(0, 2 * share - 1)[:, None]
    done, put = (u < bar for u in edited)
    right = np.take_along_axis(clean, np.maximum(found.column, 0), axis=1)
    kept = np.where(stands & done, right, text)

    # A column that no slot stands for goes into the gap that it is missing in.
    absent = (column < columns[:, None]) & ~(found.column[:, :, None] == column).any(axis=1)
    order = absent.cumsum(axis=1) - 1
    gap = (found.missing.cumsum(axis=1)[:, None] <= order[..., None]).sum(axis=2)
    added = np.where(inserted < 0.5, mask_id, clean)

    nowhere = 2 * clean.shape[1] + 2
    places = np.where(exists, 2 * column + 1, nowhere), np.where(absent, 2 * gap, nowhere)
    sequence = np.concatenate(places, axis=1).argsort(axis=1, kind="stable")
    cells = np.concatenate([kept, added], axis=1)
    there = np.concatenate([exists & (stands | ~done), absent & put], axis=1)
    return (
        np.take_along_axis(cells, sequence, axis=1),
        np.take_along_axis(there, sequence, axis=1),
    )


def own_steps(cfg: DraftsConfig, keys: Keys) -> NDArray[np.int64]:
    """Steps that the model itself writes each draft for, [K]; 0 for one that is made here."""
    steps = 1 + (uniform(*keys, _STEPS) * cfg.own_steps).astype(np.int64)
    return np.where(uniform(*keys, _OWN) < cfg.own, steps, 0)


def opened(columns: NDArray[np.int64], keys: Keys) -> NDArray[np.int64]:
    """Masks that a draft of the model's own starts from, [K]: a length off by up to a quarter, as
    a length head's is."""
    off = columns * (0.75 + 0.5 * uniform(*keys, _OPENED))
    return np.maximum(1, np.rint(off).astype(np.int64))
