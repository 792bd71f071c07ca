"""Equal lengths, wherever they fall: the baseline of fixed block size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from abf.blocks import block_lengths
from abf.errors import ConfigError
from abf.segment.base import (
    Document,
    IntArray,
    OwnReference,
    Segments,
    document_slots,
    segment_lengths,
)
from abf.segment.config import FixedSegmenter


class Fixed(OwnReference):
    """A segment every `length` slots; the last of a document is what remains."""

    def __init__(self, length: int) -> None:
        self.length = length

    def segment(self, doc: Document, reference: Segments | None) -> Segments:
        """Cut a document at multiples of `length`."""
        return Segments.rule(np.arange(0, doc.n_slots, self.length))


def build(
    cfg: FixedSegmenter, *, tokens: Path, reference: Path | None, max_block: int | None
) -> Fixed:
    """The segmenter, with the length given or the one that matches the blocks of `like`."""
    if cfg.length is not None:
        return Fixed(cfg.length)
    if reference is None or max_block is None:
        raise ConfigError("segmenter fixed needs `length`, or the segments of `like` and max_block")
    slots = document_slots(tokens, "train")
    blocks = block_lengths(segment_lengths(reference, slots, "train"), max_block)
    return Fixed(matching_length(slots, len(blocks), longest=max_block))


def matching_length(slots: IntArray, n_blocks: int, *, longest: int) -> int:
    """The length whose blocks come nearest, in mean length, to a reference's.

    Because a document's last segment is what remains, cutting at the reference's mean itself would
    give shorter segments on average, and more of them.

    Args:
        slots: slots of each document.
        n_blocks: blocks that the reference makes of them.
        longest: longest block S; up to it, a segment is one block.

    Returns:
        The length; of two that are equally near, the shorter.
    """
    mean = slots.sum() / n_blocks

    def count(length: int) -> int:
        return int((-(-slots // length)).sum())

    low, high = 1, min(longest, int(slots.max()))
    while low < high:  # the smallest length that makes no more blocks than the reference
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) <= n_blocks else (middle + 1, high)
    nearby = (max(low - 1, 1), low)
    return min(nearby, key=lambda length: abs(slots.sum() / count(length) - mean))
