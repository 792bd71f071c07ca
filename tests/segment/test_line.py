"""Lines: one block each, whatever they hold."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abf.segment.base import Document
from abf.segment.config import LineSegmenter
from abf.segment.line import build
from tests.segment.conftest import byte_starts, pretokens

LINE = build(LineSegmenter(), tokens=None, reference=None, max_block=None)  # pyright: ignore


def blocks(doc: Document) -> list[str]:
    """Text of each segment; pre-tokens are the tokens."""
    starts = LINE.segment(doc, None).start.tolist()
    edges = [pretokens(doc.text)[s][0] for s in starts] + [len(doc.text)]
    return [doc.text[a:b] for a, b in itertools.pairwise(edges)]


def test_a_list_document_is_three_blocks(make: Callable[..., Document]) -> None:
    doc = make("list: ant bee\nedit: delete ant\nanswer: bee")
    assert blocks(doc) == ["list: ant bee\n", "edit: delete ant\n", "answer: bee"]
    # The closing document token belongs to the answer: it has no segment of its own.
    assert LINE.segment(doc, None).start[-1] < len(doc.byte_start)


def test_a_last_newline_opens_no_block(make: Callable[..., Document]) -> None:
    assert blocks(make("one\ntwo\n")) == ["one\n", "two\n"]


@given(st.lists(st.text("abé .;", min_size=1).map(str.strip).filter(bool), min_size=1))
def test_blocks_are_the_lines(lines: list[str]) -> None:
    text = "\n".join(lines)
    doc = Document("d", text, "en", byte_starts(text))
    assert blocks(doc) == text.splitlines(keepends=True)


def test_blank_lines_go_with_the_line_before_and_raise_the_level(
    make: Callable[..., Document],
) -> None:
    doc = make("one\n\n\ntwo\nthree")
    found = LINE.segment(doc, None)
    assert [block.strip("\n") for block in blocks(doc)] == ["one", "two", "three"]
    assert found.level.tolist() == [1, 1, 0]
    assert found.score.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("text", ["", "\n\n", " \n", "x"])
def test_hardly_any_text_is_one_block(text: str, make: Callable[..., Document]) -> None:
    assert LINE.segment(make(text), None).start.tolist() == [0]
