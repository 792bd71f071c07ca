"""Bounds of tiles for the `triton` back end, found on the device; nothing waits for the host.

Letters: B batch, M queries, N keys. A bound is eight integers of a tile of queries, four for each
of its two ranges: lo <= full_lo <= full_hi <= hi. Keys outside [lo,hi) are seen by none of its
queries through that range, keys of [full_lo,full_hi) by all.
"""
# Triton's own types make no sense of what kernels are called with.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 128  # tiles of queries that are looked at together for a tile of keys


class Touching(NamedTuple):
    """For each tile of keys, the tiles of queries that see some of it, and through which range.

    An entry is twice the query tile, plus 1 for the second range. Ranges are disjoint, so what two
    entries of one tile contribute adds up, and a kernel masks by one range at a time.
    """

    entries: Tensor
    """int32 [B, key tiles, 2 * query tiles]: from the front those whose queries all see all of the
    keys, from the back the others; what is between is not written."""
    counts: Tensor
    """int32 [B, key tiles, 2], of either kind."""


@triton.jit(do_not_specialize=["M", "N", "tiles"])
def bounds_kernel(ranges, bounds, M, N, tiles, ROWS: tl.constexpr):
    """ranges int32 [B,M,4] -> bounds int32 [B, tiles, 8]; grid B*tiles."""
    tile, batch = tl.program_id(0) % tiles, (tl.program_id(0) // tiles).to(tl.int64)
    row = tile * ROWS + tl.arange(0, ROWS)
    inside = row < M
    at = ranges + (batch * M + row) * 4
    for which in tl.static_range(2):
        # Ranges were validated, but a replayed CUDA graph may find others: stay within the keys.
        start = tl.maximum(tl.load(at + 2 * which, mask=inside, other=0), 0)
        end = tl.minimum(tl.load(at + 2 * which + 1, mask=inside, other=0), N)
        # An empty range must not widen the span. It leaves no key that all see by itself: its
        # start is not below its end. Rows after the last query do neither.
        seen = start < end
        hi = tl.max(tl.where(seen, end, 0), 0)
        lo = tl.minimum(tl.min(tl.where(seen, start, N), 0), hi)
        full_lo = tl.max(tl.where(inside, start, 0), 0)
        full_hi = tl.min(tl.where(inside, end, N), 0)
        none = full_hi <= full_lo
        full_lo, full_hi = tl.where(none, hi, full_lo), tl.where(none, hi, full_hi)
        to = bounds + (batch * tiles + tile) * 8 + 4 * which
        tl.store(to, lo)
        tl.store(to + 1, full_lo)
        tl.store(to + 2, full_hi)
        tl.store(to + 3, hi)


@triton.jit(do_not_specialize=["N", "query_tiles", "key_tiles", "keys"])
def touching_kernel(bounds, entries, counts, N, query_tiles, key_tiles, keys, CHUNK: tl.constexpr):
    """Bounds -> `Touching`; grid B*key_tiles. Order is that of the queries, so always the same."""
    tile, batch = tl.program_id(0) % key_tiles, (tl.program_id(0) // key_tiles).to(tl.int64)
    first = tile * keys
    last = tl.minimum(first + keys, N)
    to = batch * key_tiles + tile
    n_full = 0
    n_partial = 0
    for chunk in range(0, query_tiles, CHUNK):
        query_tile = chunk + tl.arange(0, CHUNK)
        inside = query_tile < query_tiles
        at = bounds + (batch * query_tiles + query_tile) * 8
        for which in tl.static_range(2):
            lo = tl.load(at + 4 * which, mask=inside, other=0)
            full_lo = tl.load(at + 4 * which + 1, mask=inside, other=0)
            full_hi = tl.load(at + 4 * which + 2, mask=inside, other=0)
            hi = tl.load(at + 4 * which + 3, mask=inside, other=0)
            all_seen = (full_lo <= first) & (full_hi >= last)
            full = all_seen.to(tl.int32)
            partial = ((lo < last) & (hi > first)).to(tl.int32) * (1 - full)
            place_full = n_full + tl.cumsum(full, 0) - 1
            place_partial = 2 * query_tiles - n_partial - tl.cumsum(partial, 0)
            place = tl.where(all_seen, place_full, place_partial)
            to_entry = entries + to * 2 * query_tiles + place
            tl.store(to_entry, 2 * query_tile + which, mask=(full + partial) > 0)
            n_full += tl.sum(full, 0)
            n_partial += tl.sum(partial, 0)
    tl.store(counts + to * 2, n_full)
    tl.store(counts + to * 2 + 1, n_partial)


class DevicePlan:
    """What the kernels need to know of the ranges of one call, each thing found when first asked.

    Args:
        ranges: int32 or int64 [B,M,4], validated.
        n_keys: N.
    """

    def __init__(self, ranges: Tensor, n_keys: int) -> None:
        # Detached: another object, or a plan kept with its ranges would keep them alive.
        self.ranges = ranges.to(torch.int32).contiguous().detach()
        self.n_keys = n_keys
        self._bounds: dict[int, Tensor] = {}
        self._touching: dict[tuple[int, int], Touching] = {}

    def bounds(self, rows: int) -> Tensor:
        """int32 [B, tiles, 8] for tiles of that many queries."""
        if rows not in self._bounds:
            batch, n_queries, _ = self.ranges.shape
            tiles = triton.cdiv(n_queries, rows)
            out = torch.empty(batch, tiles, 8, dtype=torch.int32, device=self.ranges.device)
            bounds_kernel[(batch * tiles,)](
                self.ranges, out, n_queries, self.n_keys, tiles, ROWS=rows
            )
            self._bounds[rows] = out
        return self._bounds[rows]

    def touching(self, rows: int, keys: int) -> Touching:
        """Tiles of `rows` queries that see some of each tile of `keys` keys."""
        if (rows, keys) not in self._touching:
            bounds = self.bounds(rows)
            batch, query_tiles, _ = bounds.shape
            key_tiles = triton.cdiv(self.n_keys, keys)
            out = Touching(
                bounds.new_empty(batch, key_tiles, 2 * query_tiles),
                bounds.new_empty(batch, key_tiles, 2),
            )
            touching_kernel[(batch * key_tiles,)](
                bounds, *out, self.n_keys, query_tiles, key_tiles, keys, CHUNK=CHUNK
            )
            self._touching[rows, keys] = out
        return self._touching[rows, keys]
