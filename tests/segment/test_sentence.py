"""Sentences and lines: against cuts made by hand, and the merging rule against its description."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from razdel import sentenize
from tokenizers import pre_tokenizers

from abf.segment import sentence
from abf.segment.base import Document, Segments
from abf.segment.sentence import Sentence, merge_short, to_tokens

Make = Callable[..., Document]


def spans(doc: Document, segments: Segments) -> list[str]:
    """Text of every segment; the closing slot adds none."""
    data = doc.text.encode()
    ends = [*doc.byte_start.tolist(), len(data)]
    cuts = [ends[s] for s in segments.start.tolist()] + [len(data)]
    return [data[a:b].decode() for a, b in pairwise(cuts)]


def test_prose_cut_by_hand(make: Make, prose: str) -> None:
    doc = make(prose)
    found = Sentence(1).segment(doc, None)
    assert spans(doc, found) == [
        "Mr. Hale had kept the light for thirty years.",
        " He knew its 3.5 tonnes of glass by heart.\n\n",
        '"Does it ever go out?" the girl asked.',
        " It had gone out once, on 4 May 1931, for eleven minutes.",
        " J. K. Moss of the harbour board wrote a letter (he never answered it).",
        ' "Keep it," he said!\n\n',
        "Nothing happened for a long time.",
        " Then the fog came in: first a smell, then a colour, then nothing at all.",
        " The horn spoke every 30 seconds.",
        " Zoë counted them in bed, and fell asleep at forty-one.",
    ]
    assert found.level.tolist() == [1, 0, 1, 0, 0, 0, 1, 0, 0, 0]
    assert found.score.tolist() == [1.0] * 10


def test_single_newlines_cut_and_blank_lines_are_paragraphs(make: Make) -> None:
    doc = make(
        "A title of some words\nfirst line here. Second one here.\n \t\n\n  Indented start.\n"
    )
    found = Sentence(1).segment(doc, None)
    assert spans(doc, found) == [
        "A title of some words\n",
        "first line here.",
        " Second one here.\n \t\n\n ",
        " Indented start.\n",
    ]
    assert found.level.tolist() == [1, 0, 0, 1]


CODE = '''import os


def area(w, h):
    """Of a rectangle."""
    if w < 0:
        return 0

    return w * h
\x0c
class Empty:
    pass
'''


def test_code_cut_by_hand(make: Make) -> None:
    doc = make(CODE, "python")
    found = Sentence(1).segment(doc, None)
    assert spans(doc, found) == [
        "import os\n\n\n",
        "def area(w, h):",
        '\n    """Of a rectangle."""',
        "\n    if w < 0:",
        "\n        return 0",
        "\n\n    return w * h\n\x0c\n",
        "class Empty:",
        "\n    pass\n",
    ]
    assert found.level.tolist() == [1, 1, 0, 0, 0, 1, 1, 0]


def test_short_lines_merge_inside_their_group(make: Make) -> None:
    """Groups of 4 | 7, 6, 6, 3 | 7 | 3, 4 slots: the first is short as a whole and joins the next,
    `return 0` is the last of its group and joins the previous, `class` joins the next."""
    doc = make(CODE, "python")
    found = Sentence(5).segment(doc, None)
    assert np.diff(found.start, append=doc.n_slots).tolist() == [11, 6, 9, 7, 7]
    assert spans(doc, found) == [
        "import os\n\n\ndef area(w, h):",
        '\n    """Of a rectangle."""',
        "\n    if w < 0:\n        return 0",
        "\n\n    return w * h\n\x0c\n",
        "class Empty:\n    pass\n",
    ]
    assert found.level.tolist() == [1, 0, 0, 1, 1]


def test_language_decides(make: Make) -> None:
    text = "first line here. And more of it\nsecond line here"
    assert len(Sentence(1).segment(make(text, "en"), None).start) == 3
    assert len(Sentence(1).segment(make(text, "Python"), None).start) == 2


@pytest.mark.parametrize(("text", "expected"), [("", 1), ("\n\n \n", 1), ("x", 1), ("...", 1)])
def test_tiny_documents(make: Make, text: str, expected: int) -> None:
    found = Sentence(4).segment(make(text), None)
    assert found.start.tolist() == [0]
    assert found.level.tolist() == [1]
    assert len(found.start) == expected


def test_leading_blank_lines_belong_to_the_first_segment(make: Make) -> None:
    doc = make("\n\n\nOne sentence here. Two sentences here.")
    found = Sentence(1).segment(doc, None)
    assert spans(doc, found) == ["\n\n\nOne sentence here.", " Two sentences here."]


def test_a_cut_falls_on_the_token_that_holds_the_first_byte() -> None:
    """Tokens: 'a', '. ' + first byte of É, second byte of É + 't', 'é'; É starts the sentence."""
    doc = Document("d", "a. Été", "en", np.array([0, 1, 4, 6]))
    assert doc.text.encode()[3:5] == "É".encode()
    start, level = to_tokens(doc, np.array([0, 3]), np.array([1, 0]))
    assert start.tolist() == [0, 1]
    assert level.tolist() == [1, 0]


def test_tokens_that_share_a_start() -> None:
    doc = Document("d", "one two", "en", np.array([0, 4, 4, 4]))
    assert to_tokens(doc, np.array([0, 4]), np.array([1, 0]))[0].tolist() == [0, 1]


def test_the_higher_level_wins_where_two_starts_share_a_token() -> None:
    doc = Document("d", "abcdef", "en", np.array([0, 2]))
    start, level = to_tokens(doc, np.array([0, 2, 3, 4]), np.array([1, 0, 1, 0]))
    assert (start.tolist(), level.tolist()) == ([0, 1], [1, 1])


def merged_by_description(groups: list[list[int]], least: int) -> list[int]:
    """Lengths after merging; groups are lists of segment lengths."""

    def join(lengths: list[list[int]]) -> list[list[int]]:
        # Each item is a list of segments that together are one span.
        while True:
            short = next((i for i, one in enumerate(lengths[:-1]) if sum(one) < least), None)
            if short is None:
                break
            first, second = lengths[short], lengths[short + 1]
            joined = [*first[:-1], first[-1] + second[0], *second[1:]]
            lengths = [*lengths[:short], joined, *lengths[short + 2 :]]
        if len(lengths) > 1 and sum(lengths[-1]) < least:
            *rest, before, last = lengths
            lengths = [*rest, [*before[:-1], before[-1] + last[0], *last[1:]]]
        return lengths

    inner = [[sum(one) for one in join([[n] for n in group])] for group in groups]
    return [n for group in join(inner) for n in group]


@given(
    groups=st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=6), min_size=1, max_size=6),
    least=st.integers(1, 8),
)
def test_merging_against_its_description(groups: list[list[int]], least: int) -> None:
    lengths = [n for group in groups for n in group]
    start = np.cumsum([0, *lengths])[:-1]
    level = np.array([int(i == 0) for group in groups for i in range(len(group))])
    kept = merge_short(start, level, sum(lengths), least)
    found = np.diff(kept, append=sum(lengths)).tolist()
    assert found == merged_by_description(groups, least)
    assert kept[0] == 0
    assert min(found) >= least or len(found) == 1


def test_windows_change_nothing(prose: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = " ".join([prose.replace("\n", " ")] * 30)
    expected = [one.start for one in sentenize(text)]
    for window in (150, 333, 1000):
        monkeypatch.setattr(sentence, "WINDOW", window)
        assert list(sentence._sentences(text, 0, len(text))) == expected


@pytest.mark.parametrize("text", ['{"key":"value",' * 3000, "x" * 45_000, "a;" * 22_500])
def test_a_line_without_sentence_ends_is_cut_at_the_window(text: str) -> None:
    found = list(sentence._sentences(text, 0, len(text)))
    assert found == list(range(0, len(text), sentence.WINDOW))


def test_a_window_of_spaces_holds_no_sentence() -> None:
    text = " " * 25_000 + "One here." + " " * 25_000 + "Two here."
    found = list(sentence._sentences(text, 0, len(text)))
    assert found == [25_000, 50_009]


@pytest.mark.parametrize("name", ["textwrap.py", "json/decoder.py", "locale.py"])
@pytest.mark.parametrize("least", [1, 4, 9])
def test_real_source(make: Make, name: str, least: int) -> None:
    text = (Path(sysconfig.get_paths()["stdlib"]) / name).read_text("utf-8")
    doc = make(text, "python")
    found = Sentence(least).segment(doc, None)
    starts = found.start.tolist()
    lengths = np.diff(starts, append=doc.n_slots)
    assert starts[0] == 0
    assert lengths.min() >= least
    assert "".join(spans(doc, found)) == text
    # Every cut holds the start of a line that is not blank.
    data = text.encode()
    ends = [*doc.byte_start.tolist(), len(data)]
    for start, level in zip(starts[1:], found.level[1:].tolist(), strict=True):
        token = data[ends[start] : ends[start + 1]].decode()
        before = data[: ends[start]].decode()
        assert "\n" in token or before.endswith("\n")
        gap = before[len(before.rstrip()) :] + token[: len(token) - len(token.lstrip())]
        assert level == (gap.count("\n") > 1)


def test_tokens_of_these_tests_are_gpt2_like() -> None:
    split = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str("a b\n    c")
    assert [one for one, _ in split] == ["a", "Ġb", "ĊĠĠĠ", "Ġc"]
