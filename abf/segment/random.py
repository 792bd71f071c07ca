"""The control of every semantic segmenter: the same segment lengths, in a random order.

Each document keeps its own lengths, so that the histogram is the reference's exactly and only the
places of the cuts differ.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from abf.errors import ConfigError
from abf.segment.base import Document, Segments
from abf.segment.config import RandomSegmenter


class Random:
    """Shuffle the reference's lengths by (seed, document id): no other document matters."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def segment(self, doc: Document, reference: Segments | None) -> Segments:
        """Cut a document into the reference's lengths, permuted uniformly."""
        assert reference is not None
        lengths = np.diff(reference.start.astype(np.int64), append=doc.n_slots)
        key = hashlib.blake2b(f"{self.seed}:{doc.doc_id}".encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))
        shuffled = rng.permutation(lengths)
        return Segments.rule(np.cumsum(shuffled) - shuffled)


def build(cfg: RandomSegmenter, *, tokens: Path, reference: Path | None) -> Random:
    """The segmenter; `reference` is read document by document by the stage."""
    if reference is None:
        raise ConfigError(f"segmenter random needs the segments of `like` ({cfg.like.kind})")
    return Random(cfg.seed)
