"""A block a line, whatever its length: for text whose lines are what is asked and answered.

Blank lines go with the line before them, and the closing document token with the last one. A line
starts at the token that holds its first character (see sentence.py); scores are 1, and what follows
a blank line has level 1.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from abf.segment.base import Document, OwnReference, Segments
from abf.segment.config import LineSegmenter
from abf.segment.sentence import lines, to_tokens


class Line(OwnReference):
    """Lines."""

    def segment(self, doc: Document, reference: Segments | None) -> Segments:
        """Cut a document behind its line ends."""
        found = [(first, level) for first, _, level in lines(doc.text)]
        if doc.n_slots == 1 or not found:
            return Segments.rule([0], [1])
        return Segments.rule(*to_tokens(doc, *np.array(found).T))


def build(
    cfg: LineSegmenter, *, tokens: Path, reference: Path | None, max_block: int | None
) -> Line:
    """The segmenter."""
    return Line()
