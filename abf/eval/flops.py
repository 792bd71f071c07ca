"""Modelled forward FLOPs of a decode, from its event log: a measure no machine or batch can move.

notes/decoding.md section 8: sum over forward passes of 2 * active parameters * queries, plus
4 * layers * width * queries * keys for attention, cached keys included, as `abf.diffusion.flops`
counts a training (where rows that nobody reads are spared). Active parameters are those
a row is multiplied with: all matrices of the layers and the output head (counted for every row; the
input embedding is a look-up). Prefill is left out, as in NFE.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa

from abf.decode.events import CLOSING
from abf.diffusion.flops import attention, products
from abf.model.transformer import Transformer, matrix_weights


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
    return matrix_weights(model.layers) + model.head_weight.numel()


def forward_flops(model: Transformer, passes: Passes) -> float:
    """FLOPs of one request's forward passes."""
    config = model.config
    width = config.heads * config.head_dim
    rows = products(passes.positions, active_parameters(model))
    return rows + attention(passes.pairs, width, config.layers)


def passes_from_log(events: pa.Table, *, ends: bool = False) -> dict[int, Passes]:
    """Forward passes of every request, rebuilt from EVENTS rows.

    A block that holds n slots behind c tokens is sent whole in each denoising pass (n queries, one
    more where `ends` says that the model knows ends of blocks, c keys and those each); its k
    delivered tokens are sent once more to be cached, causally. Where the clean stream is
    block-causal the last has k (k - 1) / 2 pairs more, which is neglected.
    """
    names = ("request", "type", "nfe", "length")
    columns = zip(*(events[name].to_pylist() for name in names), strict=True)
    requests: dict[int, _Counts] = {}
    for request, kind, nfe, length in columns:
        requests.setdefault(request, _Counts(int(ends))).count(kind, nfe, length)
    return {request: Passes(c.nfe, c.positions, c.pairs) for request, c in requests.items()}


@dataclass
class _Counts:
    """Passes of one request up to some event."""

    end: int
    nfe: int = 0
    positions: int = 0
    pairs: int = 0
    context: int = 0
    slots: int = 0
    closed: int = 0
    """Delivered tokens whose keys are not written yet."""

    def count(self, kind: str, nfe: int, length: int) -> None:
        """Charge the passes since the last event to the state it left, then take this one in."""
        sent, rows = nfe - self.nfe, self.slots + self.end
        self.nfe = nfe
        if self.closed and sent:
            self.positions += self.closed
            self.pairs += self.closed * self.context + self.closed * (self.closed + 1) // 2
        else:
            self.positions += sent * rows
            self.pairs += sent * rows * (self.context + rows)
        if kind == "PROMPT":
            self.context += 1
        elif kind == "INSERT":
            self.slots += 1
        elif kind == "DELETE":
            self.slots -= 1
        elif kind in CLOSING:
            self.slots, self.closed = 0, length
        elif kind == "REOPEN":
            self.slots, self.closed = length, 0
        elif kind == "KV_WRITE" and self.closed:
            self.context, self.closed = self.context + self.closed, 0
