"""Keys and values of committed text, for a batch of requests of different lengths.

Letters: B requests, G kv heads, D head dim, T = `span` cached rows (the longest request's), M new
rows. Layout of a layer's buffer along its third dimension: request b's committed rows at
0..lengths[b]-1, then, from T on, the M rows of the last forward pass, not committed yet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abf.model.config import ModelConfig


class KVCache:
    """Per-layer keys and values [B, G, capacity, D] that grow by doubling.

    A forward pass through `CacheAttend` leaves the new rows' keys and values behind the committed
    ones; `commit` keeps the first few of each request, and the next forward pass overwrites the
    rest. Nothing here is differentiated.
    """

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int = 64,
    ) -> None:
        shape = (batch, config.kv_heads, capacity, config.head_dim)
        self.keys = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.values = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.layers)]
        self.lengths = torch.zeros(batch, dtype=torch.int64, device=device)
        self.span = 0
        self._new_rows = 0

    @property
    def capacity(self) -> int:
        """Rows that fit before the buffers grow."""
        return self.keys[0].shape[2]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Record a layer's new rows."""
        rows = k.shape[2]
        end = self.span + rows
        if layer == 0:
            self._reserve(end)
            self._new_rows = rows
        assert rows == self._new_rows, "every layer of a forward pass has the same rows"
        assert k.dtype == self.keys[layer].dtype, (
            f"the cache holds {self.keys[layer].dtype}, the model computes {k.dtype}"
        )
        self.keys[layer][:, :, self.span : end] = k.detach()
        self.values[layer][:, :, self.span : end] = v.detach()

    def commit(self, lengths: Tensor) -> None:
        """Append the first `lengths[b]` rows of the last forward pass to request b, [B] int64."""
        assert int(lengths.max()) <= self._new_rows, "more rows committed than were computed"
        row = torch.arange(self._new_rows, device=lengths.device)
        request, source = torch.nonzero(row[None] < lengths[:, None], as_tuple=True)
        target = self.lengths[request] + source
        for buffer in (*self.keys, *self.values):
            # The right side is gathered into a copy first, so overlapping moves are safe.
            buffer[request, :, target] = buffer[request, :, self.span + source]
        self.lengths = self.lengths + lengths
        self.span = int(self.lengths.max())
        self._new_rows = 0

    def select(self, rows: Tensor) -> None:
        """Keep only these requests, in this order: [B'] int64 (finished ones leave)."""
        self.keys = [buffer[rows] for buffer in self.keys]
        self.values = [buffer[rows] for buffer in self.values]
        self.lengths = self.lengths[rows]
        self.span = int(self.lengths.max()) if len(self.lengths) else 0
        self._new_rows = 0

    def _reserve(self, rows: int) -> None:
        if rows <= self.capacity:
            return
        extra = max(rows, 2 * self.capacity) - self.capacity
        for buffers in (self.keys, self.values):
            for layer, buffer in enumerate(buffers):
                shape = (*buffer.shape[:2], extra, buffer.shape[3])
                buffers[layer] = torch.cat((buffer, buffer.new_zeros(shape)), dim=2)
