"""The plan of the `tiles` back end: which keys a tile of queries may see, and where to mask.

It reads the extremes of the ranges per tile, never the keys, and no shape depends on their values
but the number of key columns. Letters: B batch, M queries, N keys.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

# Key columns come in multiples of this: oneDNN compiles a bfloat16 GEMM anew for every new shape
# (0.3-1 ms, as long as the GEMM itself), and variable blocks would make every shape new.
COLUMNS = 64
HEIGHT = 32  # likewise; a tile that is a batch row's only one stays as small as it is
FEWEST = 48  # queries of a tile, if there are as many: its calls alone cost as much as 100 columns


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
    height: int  # queries, those included that fill it up
    columns: int
    spans: list[tuple[int, int]]
    masked: list[Run]
    seen: list[tuple[int, int, int]]  # (first key, last key + 1, column) some query may see


class Island(NamedTuple):
    """Tiles that see no key which tiles of another island see, and the keys that they may see."""

    tiles: list[Tile]
    keys: list[tuple[int, int]]  # in order, apart from one another

    @property
    def size(self) -> int:
        """How many keys."""
        return sum(end - start for start, end in self.keys)


# (first key, last key + 1, ranges to mask by); no ranges where every query of the tile sees all.
_Piece = tuple[int, int, tuple[int, ...]]


def plan_tiles(ranges: Tensor, n_keys: int, rows: int) -> list[list[Tile]]:
    """For each batch row of ranges [B,M,4], its tiles of at most `rows` queries."""
    batch, n_queries, _ = ranges.shape
    edges = _edges(ranges[..., 0], rows)
    sizes = [end - start for row in edges for start, end in itertools.pairwise(row)]
    # [B*M,2] number of the tile that each query is in, over all batch rows.
    tile = torch.arange(len(sizes), device=ranges.device).repeat_interleave(
        torch.tensor(sizes, dtype=torch.int64, device=ranges.device), output_size=batch * n_queries
    )
    tile = tile[:, None].expand(-1, 2)
    start, end = ranges.reshape(-1, 2, 2).long().unbind(-1)
    # An empty range must not widen the span, and leaves no key that every query sees.
    empty = start >= end
    start, end = start.masked_fill(empty, n_keys), end.masked_fill(empty, 0)
    bounds = [
        torch.zeros(len(sizes), 2, dtype=torch.int64, device=ranges.device).scatter_reduce_(
            0, tile, values, kind, include_self=False
        )
        for values, kind in ((start, "amin"), (start, "amax"), (end, "amin"), (end, "amax"))
    ]
    found = iter(torch.stack(bounds, -1).tolist())
    return [
        [
            _plan_tile(start, end, 1 if len(row) == 2 else HEIGHT, next(found), n_keys)
            for start, end in itertools.pairwise(row)
        ]
        for row in edges
    ]


def islands(tiles: list[Tile], keys: int) -> list[Island]:
    """Part tiles by the keys they see; parts go together while they have at most `keys` keys.

    A document is a part, for its rows see nothing beyond it: a pass that sums over the rows needs
    memory for the keys of one island at a time.
    """
    areas = _joined(sorted(span[:2] for tile in tiles for span in tile.seen), apart=0)
    starts = [start for start, _ in areas]
    home = list(range(len(areas)))  # of each area another one of its part, or itself

    def find(area: int) -> int:
        while home[area] != area:
            area = home[area]
        return area

    for tile in tiles:
        met = [find(bisect.bisect(starts, start) - 1) for start, _, _ in tile.seen]
        for area in met:
            home[area] = min(met)
    parts: dict[int, Island] = {}
    for number, area in enumerate(areas):
        parts.setdefault(find(number), Island([], [])).keys.append(area)
    for tile in tiles:
        if tile.seen:
            parts[find(bisect.bisect(starts, tile.seen[0][0]) - 1)].tiles.append(tile)
    found: list[Island] = []
    for part in parts.values():
        if found and found[-1].size + part.size <= keys:
            last = found.pop()
            part = Island(last.tiles + part.tiles, sorted(last.keys + part.keys))
        found.append(part)
    return [Island(part.tiles, _joined(part.keys, apart=1)) for part in found]


def _joined(spans: Iterable[tuple[int, int]], *, apart: int) -> list[tuple[int, int]]:
    """Spans in order; one where the next begins less than `apart` keys behind the end."""
    joined: list[tuple[int, int]] = []
    for start, end in spans:
        if joined and start < joined[-1][1] + apart:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _edges(first: Tensor, rows: int) -> list[list[int]]:
    """Where the tiles of each batch row begin and end.

    Queries with the same first key [B,M] (a document's, of one stream) are cut into like tiles of
    at most `rows`; less than FEWEST of them go with what follows.
    """
    batch, n_queries = first.shape
    changes: list[list[int]] = [[] for _ in range(batch)]
    for row, query in (first[:, 1:] != first[:, :-1]).nonzero().tolist():
        changes[row].append(query + 1)
    edges = []
    for ends in changes:
        cuts = [0]
        for end in [*ends, n_queries]:
            size = end - cuts[-1]
            if size >= min(FEWEST, rows) or end == n_queries:
                parts = max(1, -(-size // rows))
                step = max(1, min(rows, _up(-(-size // parts), HEIGHT)))
                cuts += [*range(cuts[-1] + step, end, step), end]
        edges.append(cuts)
    return edges


def _up(number: int, step: int) -> int:
    """The next multiple of `step`."""
    return -(-number // step) * step


def _plan_tile(
    row_start: int, row_end: int, step: int, bounds: list[list[int]], n_keys: int
) -> Tile:
    """Bounds: for each of the two ranges [first start, last start, first end, last end]."""
    height = _up(row_end - row_start, step)
    used = [which for which in (0, 1) if bounds[which][0] < bounds[which][3]]
    if not used:
        return Tile(row_start, row_end, height, 0, [], [], [])
    used.sort(key=lambda which: bounds[which][0])
    low, high = bounds[used[0]][0], bounds[used[-1]][3]
    pieces: list[_Piece] = []
    if len(used) == 2 and bounds[used[0]][3] > bounds[used[1]][0]:
        # One query's first range meets another's second: legal, though not of sorted layouts.
        pieces.append((low, max(high, bounds[used[0]][3]), (0, 1)))
    else:
        for which in used:
            pieces += _cut(which, *bounds[which])
    first, last = pieces[0][0], pieces[-1][1]
    _fill_up(pieces, n_keys)

    column = 0
    masked: list[Run] = []
    for key, key_end, which in pieces:
        if which:
            masked.append(Run(column, column + key_end - key, key, which))
        column += key_end - key
    spans = _joined(((start, end) for start, end, _ in pieces), apart=1)
    seen: list[tuple[int, int, int]] = []
    column = 0
    for start, end in spans:
        seen.append((max(start, first), min(end, last), column + max(first - start, 0)))
        column += end - start
    return Tile(row_start, row_end, height, column, spans, masked, seen)


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
