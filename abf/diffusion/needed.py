"""The rows of a pass that matter to what is read: a pass without the others gives the same.

Letters: B batch rows, M rows of each (noisy and clean), N rows needed, R rows read. A row's state
depends in every layer on itself and on the rows it sees; so what is read is needed, what that sees,
what those see, and so on. Not needed are padding, the noisy copy of a document token and, unless an
AR loss reads it, the clean text of a document's last block, which no later block sees.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from abf_kernels.block_attention.api import Backend
from torch import Tensor

from abf.diffusion.layout import TwoStream


class Layers(Protocol):
    """What makes states of rows (`abf.model.transformer.Transformer`)."""

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Any,
        *,
        rows: Tensor | None = None,
        granularity: Tensor | None = None,
    ) -> Tensor: ...

    def attend(self, ranges: Tensor, *, backend: Backend) -> Any: ...


def read_states(model: Layers, streams: TwoStream, rows: Tensor, *, backend: Backend) -> Tensor:
    """[R, d] states of some rows of B*M, from a pass over those they need."""
    line = needed(streams, rows)
    attend = model.attend(line.ranges, backend=backend)
    return model.hidden(
        line.ids, line.positions, attend, rows=line.rows, granularity=line.granularity
    )


@dataclass
class Line:
    """The rows needed, of all batch rows, one after another: noisy ones first."""

    ids: Tensor
    """[1, N]."""
    positions: Tensor
    """[1, N]."""
    ranges: Tensor
    """[1, N, 4]."""
    granularity: Tensor | None
    """[1, N]."""
    rows: Tensor
    """[R] where the rows to read are."""


def needed(streams: TwoStream, read: Tensor) -> Line:
    """Leave out what nothing read depends on.

    Args:
        streams: rows of a pass.
        read: [R] int64 flat indices into B*M.
    """
    B, M = streams.ids.shape
    first = M * torch.arange(B)
    start, end = (streams.ranges.long() + first[:, None, None]).view(-1, 2, 2).unbind(-1)
    live = torch.zeros(B * M, dtype=torch.bool)
    live[read] = True
    while not torch.equal(live, seen := live | _covered(start[live], end[live], B * M)):
        live = seen
    index = (first[:, None] + torch.arange(M)).split([streams.noisy, M - streams.noisy], dim=1)
    order = torch.cat([part.flatten() for part in index])
    order = order[live[order]]
    place = torch.zeros(B * M + 1, dtype=torch.int64)
    place[order] = torch.arange(len(order))
    # What a needed row sees is needed: a range stays one.
    start, size = place[start[order]], (end - start)[order]
    start = start * (size > 0)
    return Line(
        ids=streams.ids.flatten()[order][None],
        positions=streams.positions.flatten()[order][None],
        ranges=torch.stack((start, start + size), -1).view(1, -1, 4).to(streams.ranges.dtype),
        granularity=None
        if streams.granularity is None
        else streams.granularity.flatten()[order][None],
        rows=place[read],
    )


def _covered(start: Tensor, end: Tensor, size: int) -> Tensor:
    """Bool [size]: what lies in some range [start, end)."""
    change = torch.zeros(size + 1, dtype=torch.int64)
    for edge, step in ((start, 1), (end, -1)):
        change.index_add_(0, edge.flatten(), edge.new_full((edge.numel(),), step))
    return change.cumsum(0)[:-1] > 0
