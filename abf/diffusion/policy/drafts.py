"""Drafts: finished blocks with mistakes such as a sampler makes, to learn edits from.

Kinds: right already; one edit away; cut short or a span missing; running on into the next block; an
n-gram said twice; tokens dropped, replaced and added at random. In some of each kind tokens are
masked, in some of these all of them (a block just opened with a wrong length). What a draft needs
is found afterwards by alignment (`abf.diffusion.policy.align`).
Source: notes/method.md §E4; over-runs and truncations are this project's.

Letters: K blocks, n columns (finished tokens) and m slots of the longest, C cells: the tokens and
what may be put between them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from abf.diffusion.config import DraftsConfig
from abf.diffusion.rng import uniform

GRAM, OVERRUN = 4, 8
"""Longest repeated n-gram, and most tokens of the next block, in tokens."""
(_OWN, _STEPS, _OPENED) = range(12, 15)
(_KIND, _AMOUNT, _PLACE, _CHOICE, _DROP, _REPLACE, _ADD, _FOREIGN, _ID, _MASKED, _LEVEL, _HIDE) = (
    range(16, 28)
)
_HIDE_BEYOND = 28
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
    nearby: NDArray[np.int64]
    """[K, P] tokens of the same row, any of which may be taken for another."""


def draft(
    finished: Finished, cfg: DraftsConfig, *, keys: Keys, vocab: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """One draft of each block.

    Args:
        finished: the blocks.
        cfg: how often which mistake.
        keys: counters [K] that the random numbers are a function of.
        vocab: V; MASK is V.

    Returns:
        cells [K, C] tokens and MASKs, and which of them are there.
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

    edges = np.cumsum([cfg.right, cfg.near, cfg.cut, cfg.overrun, cfg.repeat])
    kind = (one(_KIND)[:, None] >= edges).sum(axis=1)
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

    mixed = (kind == 5)[:, None]
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

    level = one(_LEVEL)
    hidden = np.where(level < cfg.opened, 1.0, (level - cfg.opened) / (1 - cfg.opened))
    # Numbers of their own for what runs on: it lies behind the longest block of the batch, and a
    # draft must not depend on the blocks beside it.
    chance = many(_HIDE, cells.shape[1] - OVERRUN), many(_HIDE_BEYOND, OVERRUN)
    hide = (one(_MASKED) < cfg.masked)[:, None] & (np.concatenate(chance, 1) < hidden[:, None])
    return np.where(hide, vocab, cells), present


def own_steps(cfg: DraftsConfig, keys: Keys) -> NDArray[np.int64]:
    """Steps that the model itself writes each draft for, [K]; 0 for one that is made here."""
    steps = 1 + (uniform(*keys, _STEPS) * cfg.own_steps).astype(np.int64)
    return np.where(uniform(*keys, _OWN) < cfg.own, steps, 0)


def opened(columns: NDArray[np.int64], keys: Keys) -> NDArray[np.int64]:
    """Masks that a draft of the model's own starts from, [K]: a length off by up to a quarter, as
    a length head's is."""
    off = columns * (0.75 + 0.5 * uniform(*keys, _OPENED))
    return np.maximum(1, np.rint(off).astype(np.int64))
