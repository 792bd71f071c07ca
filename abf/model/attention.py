"""The one attention seam: everything the model knows about who sees whom goes through here.

Letters: B batch rows, M query rows, H/G query/kv heads, D head dim.
The back end is chosen explicitly by the caller; an unknown or unfit one is an error, never a
silent replacement.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from abf_kernels.block_attention.api import block_attention
from abf_kernels.block_decode.api import Requests, block_decode, requests
from torch import Tensor

from abf.errors import ConfigError
from abf.model.cache import KVCache
from abf.model.config import AttentionBackend, ModelConfig


class Attend(Protocol):
    """Attention of one layer."""

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        """q [B, H, M, D], k and v [B, G, M, D] -> [B, H, M, D].

        With `rows` [R] int64, of the only batch row: q [1, H, R, D] -> [1, H, R, D].
        """
        ...


def check_backend(
    backend: AttentionBackend, model: ModelConfig, *, device: torch.device, precision: str
) -> None:
    """Find out whether a back end can attend, before anything is computed.

    Args:
        device: what is computed on.
        precision: `bf16` or `fp32`.

    Raises:
        ConfigError: it cannot, and why.
    """
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    row = torch.zeros(1, model.heads, 1, model.head_dim, dtype=dtype, device=device)
    keys = row[:, : model.kv_heads]
    ranges = torch.tensor([[[0, 1, 0, 0]]], device=device)
    try:
        block_attention(row, keys, keys, ranges, backend=backend)
    except (ValueError, ImportError) as error:
        raise ConfigError(
            f"attention: {backend!r} cannot be used here: {error}; 'tiles' runs everywhere"
        ) from error


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
        query_lengths: [B] int, valid new rows of each request (1 to M).
        own: `block`, a new row sees all its request's new rows; `causal`, those up to itself.
        backend: back end of `abf_kernels.block_decode`.
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
        self._asked: Requests | None = None

    def seen(self, rows: int) -> Tensor:
        """[B, rows] int64: how many of its request's new rows each row sees; 0 if not valid."""
        valid = self.query_lengths[:, None]
        row = torch.arange(rows, device=valid.device)[None]
        seen = valid.expand(-1, rows) if self.own == "block" else row + 1
        return seen * (row < valid)

    def __call__(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None
    ) -> Tensor:
        B, _, M, _ = k.shape
        self.cache.write(layer, k, v)
        if layer == 0:
            self._asked = self._requests(M, None)
        if rows is not None and not len(rows):
            return q
        # Of one row, all rows are asked.
        asked = self._asked if rows is None or M == 1 else self._requests(M, rows)
        assert asked is not None, "layers come in their order"
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))
        found = block_decode(
            q, k, v, self.cache.keys[layer], self.cache.values[layer], asked, backend=self.backend
        )
        return found.unflatten(0, (B, -1)).transpose(1, 2)

    def _requests(self, M: int, rows: Tensor | None) -> Requests:
        """Request b has the rows from b*M on; its cache is one page as long as the buffer. With
        `rows`, which only a batch of one request has, it asks for those alone."""
        B, device = len(self.query_lengths), self.query_lengths.device
        first = torch.arange(B, dtype=torch.int32, device=device) * M
        own = torch.stack((first, first + self.query_lengths.int()), dim=1)
        queries, seen = own, self.seen(M).flatten().int()
        if rows is not None:
            queries, seen = queries.new_tensor([[0, len(rows)]]), seen[rows]
        return requests(
            torch.arange(B, dtype=torch.int32, device=device)[:, None],
            self.cache.lengths.int(),
            queries,
            own,
            seen,
            page_size=self.cache.capacity,
            pages=B,
            rows=len(seen),
            own_rows=B * M,
        )
