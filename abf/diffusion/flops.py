"""Model FLOPs, counted where the products are made: what the mathematics asks of a machine.

One counting for training and decoding (notes/decoding.md section 8): 2 * weights for every row
that goes through a matrix, 4 * width * pairs for attention in a layer (scores and mixing, every
query with every key that it sees). Gradients cost twice as much again. Norms, rotations, look-ups
and the small heads are left out, and so is what is computed twice to save memory. Padding counts
for nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

import torch

BACKWARD = 3
"""A pass whose gradients are taken costs so many times as much as it alone."""


@dataclass
class Counter:
    """FLOPs of some passes."""

    flops: float = 0.0


_active: ContextVar[Counter | None] = ContextVar("flops", default=None)


def products(rows: int, weights: int) -> float:
    """FLOPs of so many rows going through matrices of so many weights in all."""
    return 2.0 * rows * weights


def attention(pairs: int, width: int, layers: int) -> float:
    """FLOPs of attention over query-key pairs, heads together `width` wide."""
    return 4.0 * layers * width * pairs


@contextmanager
def counting() -> Iterator[Counter]:
    """Count the forward passes of the body; with gradients if they are on, as what they will
    cost with their backward."""
    counter = Counter()
    token = _active.set(counter)
    try:
        yield counter
    finally:
        _active.reset(token)


def is_counted() -> bool:
    """Whether somebody counts."""
    return _active.get() is not None


def count(flops: float) -> None:
    """Count the FLOPs of a forward pass, if somebody does."""
    if (counter := _active.get()) is not None:
        counter.flops += flops * (BACKWARD if torch.is_grad_enabled() else 1)
