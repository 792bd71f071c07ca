"""The control of every semantic segmenter: the same segment lengths, in other places.

Documents of equal length exchange their segment lengths, and each then shuffles what it got: the
corpus keeps the reference's histogram exactly, and only the places of the cuts differ. Shuffling
alone would leave a short document of a few sentences with a quarter of its cuts where they were.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np

from abf.errors import ConfigError
from abf.segment.base import Document, IntArray, Segments
from abf.segment.config import RandomSegmenter


class Random:
    """Exchange lengths among documents of equal length, then shuffle by (seed, document id)."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def donors(self, slots: IntArray) -> IntArray:
        """A random cycle through the documents of each length: nobody keeps its own."""
        found = np.arange(len(slots))
        for length in np.unique(slots):
            group = self._rng(f"exchange:{length}").permutation(np.flatnonzero(slots == length))
            found[group] = np.roll(group, 1)
        return found

    def segment(self, doc: Document, reference: Segments | None) -> Segments:
        """Cut a document into the donor's lengths, permuted uniformly."""
        assert reference is not None
        lengths = np.diff(reference.start.astype(np.int64), append=doc.n_slots)
        shuffled = self._rng(f"shuffle:{doc.doc_id}").permutation(lengths)
        return Segments.rule(np.cumsum(shuffled) - shuffled)

    def _rng(self, purpose: str) -> np.random.Generator:
        key = hashlib.blake2b(f"{self.seed}:{purpose}".encode(), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "big")))


def build(
    cfg: RandomSegmenter, *, tokens: Path, reference: Path | None, max_block: int | None
) -> Random:
    """The segmenter; `reference` is read document by document by the stage."""
    if reference is None:
        raise ConfigError(f"segmenter random needs the segments of `like` ({cfg.like.kind})")
    return Random(cfg.seed)
