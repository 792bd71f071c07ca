"""Sentences of prose, lines of code; both cut at the token that holds the first character.

Prose: every newline ends a paragraph, and razdel finds the sentences inside one (so hard-wrapped
text should be unwrapped first). Code: every line that is not blank starts a segment. In both, what
follows a blank line has level 1. A token is never split: whitespace that the tokenizer joins to a
word, or a newline it joins to the next line's indentation, goes with what follows it.

Segments shorter than `min_tokens` then join the next one; the last of a paragraph group (the text
between blank lines) joins the previous one, and a group that is short as a whole joins the next
group. Boundary scores are 1.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
from razdel import sentenize

from abf.segment.base import Document, IntArray, OwnReference, Segments
from abf.segment.config import SentenceSegmenter

_NAMES = """bash c c++ c# cpp css cuda fortran go haskell html java javascript json julia kotlin lua
make ocaml perl php python r ruby rust scala shell sql swift toml typescript yaml zig"""
PROGRAMMING = frozenset(_NAMES.split())
"""Languages cut at lines."""

WINDOW = 10_000
"""Characters razdel sees at once: its time grows with the square of a line without sentence ends
(90 s for 1.7 MB of one-line JSON). A longer sentence is cut here, far above any block length."""

_LINE_END = re.compile(r"\n(?:[^\S\n]*\n)*")
"""A line end and the blank lines after it."""


class Sentence(OwnReference):
    """Sentences or lines, at least `min_tokens` long."""

    def __init__(self, min_tokens: int) -> None:
        self.min_tokens = min_tokens

    def segment(self, doc: Document, reference: Segments | None) -> Segments:
        """Cut a document; see the module's rule."""
        starts: list[int] = []
        levels: list[int] = []
        for first, end, level in lines(doc.text):
            if doc.language.lower() in PROGRAMMING:
                starts.append(first)
                levels.append(level)
            else:
                found = list(_sentences(doc.text, first, end)) or [first]
                starts += found
                levels += [level] + [0] * (len(found) - 1)
        if doc.n_slots == 1 or not starts:
            return Segments.rule([0], [1])
        start, level = to_tokens(doc, np.array(starts), np.array(levels))
        kept = merge_short(start, level, doc.n_slots, self.min_tokens)
        return Segments.rule(kept, level[np.searchsorted(start, kept)])


def build(
    cfg: SentenceSegmenter, *, tokens: Path, reference: Path | None, max_block: int | None
) -> Sentence:
    """The segmenter."""
    return Sentence(cfg.min_tokens)


def lines(text: str) -> Iterator[tuple[int, int, int]]:
    """(first character, end, level) of the lines that are not blank; level 1 after a blank line."""
    first, level = 0, 1
    for match in _LINE_END.finditer(text):
        if match.start() > first:
            yield first, match.start(), level
        first, level = match.end(), int(match.end() - match.start() > 1)
    if first < len(text):
        yield first, len(text), level


def _sentences(text: str, first: int, end: int) -> Iterator[int]:
    """Characters where the sentences of text[first:end] start."""
    while first < end:
        stop = min(first + WINDOW, end)
        found = [first + one.start for one in sentenize(text[first:stop]) if one.text]
        # The last sentence may go on beyond the window: look at it again, from its start.
        again = stop < end and bool(found) and found[-1] > first
        first = found.pop() if again else stop
        yield from found


def to_tokens(doc: Document, char: IntArray, level: IntArray) -> tuple[IntArray, IntArray]:
    """The tokens that hold characters `char` (increasing), each once with the highest level.

    The first segment starts at token 0 whatever comes before the first sentence, and has level 1.
    """
    byte = char
    if not doc.text.isascii():
        data = np.frombuffer(doc.text.encode("utf-8"), np.uint8)
        byte = np.flatnonzero((data & 0xC0) != 0x80)[char]
    token = np.searchsorted(doc.byte_start, byte, side="right") - 1
    # Tokens that share a start (lossy tokenizers only): the first of them.
    token = np.searchsorted(doc.byte_start, doc.byte_start[token], side="left")
    token[:1] = 0
    start, group = np.unique(token, return_inverse=True)
    highest = np.zeros(len(start), dtype=np.int64)
    np.maximum.at(highest, group, level)
    highest[0] = 1
    return start, highest


def merge_short(start: IntArray, level: IntArray, n_slots: int, min_tokens: int) -> list[int]:
    """Starts that remain once segments shorter than `min_tokens` slots are merged.

    A group is opened by a start of level 1. First each group is merged by itself, then whole groups
    that are too short are merged with each other.
    """
    starts = start.tolist()
    opens = np.flatnonzero(level).tolist()
    kept: list[int] = []
    for first, end in pairwise([*opens, len(starts)]):
        ends_at = starts[end] if end < len(starts) else n_slots
        kept += _joined(starts[first:end], ends_at, min_tokens)
    groups = [starts[i] for i in opens]
    dropped = set(groups).difference(_joined(groups, n_slots, min_tokens))
    return [one for one in kept if one not in dropped]


def _joined(starts: list[int], end: int, min_tokens: int) -> list[int]:
    """A short span joins the next one, the last the previous; `end` is where the last one ends."""
    kept = starts[:1]
    for start in starts[1:]:
        if start - kept[-1] >= min_tokens:
            kept.append(start)
    if len(kept) > 1 and end - kept[-1] < min_tokens:
        kept.pop()
    return kept
