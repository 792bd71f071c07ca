"""Equal lengths, wherever they fall: the baseline of fixed block size."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from abf.errors import ConfigError
from abf.segment.base import (
    Document,
    IntArray,
    OwnReference,
    Segments,
    count_segments,
    document_slots,
)
from abf.segment.config import FixedSegmenter


class Fixed(OwnReference):
    """A segment every `length` slots; the last of a document is what remains."""

    def __init__(self, length: int) -> None:
        self.length = length

    def segment(self, doc: Document, reference: Segments | None) -> Segments:
        """Cut a document at multiples of `length`."""
        return Segments.rule(np.arange(0, doc.n_slots, self.length))


def build(cfg: FixedSegmenter, *, tokens: Path, reference: Path | None) -> Fixed:
    """The segmenter, with the length given or the one that matches the mean of `like`."""
    if cfg.length is not None:
        return Fixed(cfg.length)
    if reference is None:
        raise ConfigError("segmenter fixed needs `length`, or the segments of `like`")
    slots = document_slots(tokens, "train")
    return Fixed(matching_length(slots, count_segments(reference, "train")))


def matching_length(slots: IntArray, n_segments: int) -> int:
    """The length whose segments come nearest, in mean length, to a reference.

    Because a document's last segment is what remains, cutting at the reference's mean itself would
    give shorter segments on average, and more of them.

    Args:
        slots: slots of each document.
        n_segments: segments that the reference makes of them.

    Returns:
        The length; of two that are equally near, the shorter.
    """
    mean = slots.sum() / n_segments

    def count(length: int) -> int:
        return int((-(-slots // length)).sum())

    low, high = 1, int(slots.max())
    while low < high:  # the smallest length that makes no more segments than the reference
        middle = (low + high) // 2
        low, high = (low, middle) if count(middle) <= n_segments else (middle + 1, high)
    nearby = (max(low - 1, 1), low)
    return min(nearby, key=lambda length: abs(slots.sum() / count(length) - mean))
