"""Modelled forward FLOPs of a decode, from its event log: a measure no machine or batch can move.

notes/decoding.md section 8: sum over forward passes of 2 * active parameters * queries, plus
4 * layers * width * queries * keys for attention, cached keys included. Active parameters are those
a row is multiplied with: all matrices of the layers and the output head (counted for every row; the
input embedding is a look-up). Prefill is left out, as in NFE.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from abf.model.transformer import Transformer


@dataclass(frozen=True)
class Passes:
    """Forward passes of one request."""

    nfe: int
    positions: int
    """Query rows."""
    pairs: int
    """Query-key pairs."""


def active_parameters(model: Transformer) -> int:
    """Parameters that every row is multiplied with."""
    matrices = sum(p.numel() for p in model.layers.parameters() if p.dim() == 2)
    return matrices + model.head_weight.numel()


def forward_flops(model: Transformer, passes: Passes) -> float:
    """FLOPs of one request's forward passes."""
    config = model.config
    width = config.heads * config.head_dim
    return (
        2.0 * active_parameters(model) * passes.positions
        + 4.0 * config.layers * width * passes.pairs
    )


def passes_from_log(events: pa.Table) -> dict[int, Passes]:
    """Forward passes of every request, rebuilt from EVENTS rows.

    A block opened with n slots behind c tokens is sent whole in each denoising pass (n queries,
    c + n keys each); its k delivered tokens are sent once more to be cached, causally. Where the
    clean stream is block-causal the last has k (k - 1) / 2 pairs more, which is neglected.
    """
    names = ("request", "type", "nfe", "length")
    columns = zip(*(events[name].to_pylist() for name in names), strict=True)
    context: dict[int, int] = {}
    opened: dict[int, tuple[int, int]] = {}
    totals: dict[int, NDArray[np.int64]] = {}
    for request, kind, nfe, length in columns:
        if kind == "PROMPT":
            context[request] = context.get(request, 0) + 1
            totals.setdefault(request, np.zeros(3, dtype=np.int64))
        elif kind == "OPEN":
            opened[request] = (length, nfe)
        elif kind in ("COMPLETE", "FORCED_COMPLETE"):
            slots, since = opened[request]
            before = context[request]
            sent = nfe - since
            written = length * before + length * (length + 1) // 2
            totals[request] += (
                sent + 1,
                sent * slots + length,
                sent * slots * (before + slots) + written,
            )
            context[request] += length
    return {request: Passes(*map(int, total)) for request, total in totals.items()}
