"""The plan of the `tiles` back end: which keys a tile of queries may see, and where to mask.

It reads the extremes of the ranges per tile, never the keys, and no shape depends on their values
but the number of key columns. Letters: B batch, M queries, N keys.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# Key columns come in multiples of this: oneDNN compiles a bfloat16 GEMM anew for every new shape
# (0.3-1 ms, as long as the GEMM itself), and variable blocks would make every shape new.
COLUMNS = 64


class Run(NamedTuple):
    """Score columns [start, end), holding the keys from `key` on, to be masked by these ranges."""

    start: int
    end: int
    key: int
    which: tuple[int, ...]  # 0 = (a0,a1), 1 = (b0,b1)


class Tile(NamedTuple):
    """Queries [start, end) of one batch row; the key spans side by side are its score columns."""

    start: int
    end: int
    columns: int
    spans: list[tuple[int, int]]
    masked: list[Run]


# (first key, last key + 1, ranges to mask by); no ranges where every query of the tile sees all.
_Piece = tuple[int, int, tuple[int, ...]]


def plan_tiles(ranges: Tensor, n_keys: int, rows: int) -> list[list[Tile]]:
    """For each batch row of ranges [B,M,4], its tiles of `rows` queries (fewer in the last)."""
    batch, n_queries, _ = ranges.shape
    n_tiles = -(-n_queries // rows)
    if n_queries % rows:  # repeat the last row: that changes no extreme
        index = torch.arange(n_tiles * rows, device=ranges.device).clamp_(max=n_queries - 1)
        ranges = ranges[:, index]
    start, end = ranges.reshape(batch, n_tiles, rows, 2, 2).unbind(-1)
    # An empty range must not widen the span, and leaves no key that every query sees.
    empty = start >= end
    start, end = start.masked_fill(empty, n_keys), end.masked_fill(empty, 0)
    bounds = torch.stack((start.amin(2), start.amax(2), end.amin(2), end.amax(2)), -1)
    return [
        [
            _plan_tile(t * rows, min((t + 1) * rows, n_queries), tile_bounds, n_keys)
            for t, tile_bounds in enumerate(row_bounds)
        ]
        for row_bounds in bounds.tolist()
    ]


def _plan_tile(row_start: int, row_end: int, bounds: list[list[int]], n_keys: int) -> Tile:
    """Bounds: for each of the two ranges [first start, last start, first end, last end]."""
    used = [which for which in (0, 1) if bounds[which][0] < bounds[which][3]]
    if not used:
        return Tile(row_start, row_end, 0, [], [])
    used.sort(key=lambda which: bounds[which][0])
    low, high = bounds[used[0]][0], bounds[used[-1]][3]
    pieces: list[_Piece] = []
    if len(used) == 2 and bounds[used[0]][3] > bounds[used[1]][0]:
        # One query's first range meets another's second: legal, though not of sorted layouts.
        pieces.append((low, max(high, bounds[used[0]][3]), (0, 1)))
    else:
        for which in used:
            pieces += _cut(which, *bounds[which])
    _fill_up(pieces, n_keys)

    column = 0
    spans: list[tuple[int, int]] = []
    masked: list[Run] = []
    for key, key_end, which in pieces:
        if spans and spans[-1][1] == key:
            spans[-1] = (spans[-1][0], key_end)
        else:
            spans.append((key, key_end))
        if which:
            masked.append(Run(column, column + key_end - key, key, which))
        column += key_end - key
    return Tile(row_start, row_end, column, spans, masked)


def _cut(which: int, low: int, full_low: int, full_high: int, high: int) -> list[_Piece]:
    """Ragged edge, keys seen by the whole tile, ragged edge; all ragged where few are."""
    if full_high - full_low < COLUMNS:
        return [(low, high, (which,))]
    pieces: list[_Piece] = [(full_low, full_high, ())]
    if low < full_low:
        pieces.insert(0, (low, full_low, (which,)))
    if full_high < high:
        pieces.append((full_high, high, (which,)))
    return pieces


def _fill_up(pieces: list[_Piece], n_keys: int) -> None:
    """Widen the outermost pieces, masked, to a multiple of COLUMNS keys if there are as many."""
    missing = -sum(end - start for start, end, _ in pieces) % COLUMNS
    start, end, which = pieces[-1]
    right = min(missing, n_keys - end)
    if right and which:
        pieces[-1] = (start, end + right, which)
    elif right:
        # No query's range reaches past `end`, so any of the ranges masks these keys.
        pieces.append((end, end + right, (0, 1)))
    start, end, which = pieces[0]
    left = min(missing - right, start)
    if left and which:
        pieces[0] = (start - left, end, which)
    elif left:
        pieces.insert(0, (start - left, start, (0, 1)))
