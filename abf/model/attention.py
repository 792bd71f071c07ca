"""The one attention seam: everything the model knows about who sees whom goes through here.

Letters: B batch rows, M query rows, N key rows, H/G query/kv heads, D head dim, T cached keys.
The back end is chosen explicitly by the caller; an unknown or unfit one is an error, never a
silent replacement.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from abf_kernels.block_attention.api import block_attention
from torch import Tensor

from abf.model.cache import KVCache
from abf.model.config import AttentionBackend


class Attend(Protocol):
    """Attention of one layer."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """q [B, H, M, D], k and v [B, G, M, D] -> [B, H, M, D].

        With `rows` [R] int64, of the only batch row: q [1, H, R, D] -> [1, H, R, D].
        """
        ...


class RangeAttend:
    """Each row sees the union of two ranges of the same rows: training, and scoring a text.

    Args:
        ranges: [B, M, 4] int, (a0, a1, b0, b1): keys a0..a1-1 and b0..b1-1, disjoint; both may be
            empty.
        backend: back end of `abf_kernels.block_attention`.
    """

    def __init__(self, ranges: Tensor, *, backend: AttentionBackend) -> None:
        self.ranges = ranges
        self.backend: AttentionBackend = backend

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        ranges = self.ranges if rows is None else self.ranges[:, rows]
        return block_attention(q, k, v, ranges, backend=self.backend)


class CacheAttend:
    """Each request sees its own cached prefix and its own new rows: decoding.

    Requests of one batch may differ in cached length and in new rows; rows beyond a request's
    `query_lengths` see nothing and are seen by nobody.

    Args:
        cache: keys and values of the committed text; the new rows' are recorded in it.
        query_lengths: [B] int, valid new rows of each request (at most M).
        own: `block`, a new row sees all its request's new rows; `causal`, those up to itself.
        backend: back end of `abf_kernels.block_attention`.
    """

    def __init__(
        self,
        cache: KVCache,
        *,
        query_lengths: Tensor,
        own: Literal["block", "causal"],
        backend: AttentionBackend,
    ) -> None:
        assert query_lengths.shape == cache.lengths.shape, (
            f"{tuple(query_lengths.shape)} query lengths for {tuple(cache.lengths.shape)} requests"
        )
        self.cache, self.query_lengths, self.own = cache, query_lengths, own
        self.backend: AttentionBackend = backend
        self._ranges: Tensor | None = None

    def ranges(self, rows: int) -> Tensor:
        """[B, rows, 4] int64: (0, n_b, T, T + new rows seen), all 0 on rows that are not valid."""
        cached, valid = self.cache.lengths[:, None], self.query_lengths[:, None]
        row = torch.arange(rows, device=cached.device)[None]
        seen = valid.expand(-1, rows) if self.own == "block" else row + 1
        start = self.cache.span
        ranges = torch.stack(
            [
                torch.zeros_like(row).expand(len(cached), -1),
                cached.expand(-1, rows),
                torch.full_like(row, start).expand(len(cached), -1),
                (start + seen).expand(len(cached), -1),
            ],
            dim=-1,
        )
        return ranges * (row < valid).unsqueeze(-1)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        if self._ranges is None:
            self._ranges = self.ranges(k.shape[2])
        ranges = self._ranges if rows is None else self._ranges[:, rows]
        keys, values = self.cache.write(layer, k, v)
        return block_attention(q, keys, values, ranges, backend=self.backend)
