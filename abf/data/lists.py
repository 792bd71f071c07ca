"""Synthetic list editing: documents whose last line follows from the two before it.

    list: crab lamp gate
    edit: insert fern after lamp; move gate to front
    answer: gate crab lamp fern

Edits are made one after the other, each on what the one before has left; a list never holds a word
twice. The answer ends with the document. Asking for more documents changes none of the first ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from abf.data.config import WORDS, ListsSource, Operation
from abf.errors import DataError

LIST, EDIT, ANSWER = "list:", "edit:", "answer:"

_FORMS: dict[Operation, re.Pattern[str]] = {
    "insert": re.compile(r"insert (\w+) after (\w+)"),
    "delete": re.compile(r"delete (\w+)()"),
    "replace": re.compile(r"replace (\w+) by (\w+)"),
    "move": re.compile(r"move (\w+) (?:to front|after (\w+))"),
}


class Edit(NamedTuple):
    """One instruction."""

    operation: Operation
    word: str
    """What is inserted, deleted, replaced or moved."""
    other: str = ""
    """The word it goes behind, or that takes its place; "" for delete, and for the front."""

    def __str__(self) -> str:
        if self.operation == "replace":
            return f"replace {self.word} by {self.other}"
        if self.operation == "delete":
            return f"delete {self.word}"
        return f"{self.operation} {self.word} {f'after {self.other}' if self.other else 'to front'}"


class Exercise(NamedTuple):
    """A list and what is to be done with it."""

    words: Sequence[str]
    edits: Sequence[Edit]

    @property
    def answer(self) -> list[str]:
        """The list after its edits.

        Raises:
            DataError: an edit that cannot be made; says which.
        """
        found = list(self.words)
        for edit in self.edits:
            found = edited(found, edit)
        return found

    def __str__(self) -> str:
        """What is shown: everything up to the answer's line."""
        return f"{LIST} {' '.join(self.words)}\n{EDIT} {'; '.join(map(str, self.edits))}\n"


def edited(words: Sequence[str], edit: Edit) -> list[str]:
    """The list after one edit."""
    named = [edit.word, edit.other]
    absent = named[:1] if edit.operation == "insert" else named[1:] * (edit.operation == "replace")
    for word in filter(None, named):
        if (word in words) == (word in absent):
            state = "is there already" if word in words else "is not there"
            raise DataError(f"{str(edit)!r} of the list {' '.join(words)!r}: {word!r} {state}")
    if edit.operation == "replace":
        return [edit.other if word == edit.word else word for word in words]
    found = [word for word in words if word != edit.word]
    if edit.operation != "delete":
        found.insert(found.index(edit.other) + 1 if edit.other else 0, edit.word)
    return found


def answer_line(words: Sequence[str]) -> str:
    """The line that is asked for."""
    return " ".join([ANSWER, *words])


def parse(prompt: str) -> Exercise:
    """Read what `str(exercise)` wrote.

    Raises:
        DataError: other text; shows it.
    """
    match = re.fullmatch(rf"{LIST} (.*)\n{EDIT} (.*)\n", prompt)
    if match is None:
        raise DataError(f"{prompt!r} is no list with edits, as the source `lists` writes them")
    return Exercise(match[1].split(), [_edit(text) for text in match[2].split("; ")])


def _edit(text: str) -> Edit:
    for operation, form in _FORMS.items():
        if match := form.fullmatch(text):
            return Edit(operation, match[1], match[2] or "")
    raise DataError(f"{text!r} is no edit; edits are {', '.join(_FORMS)}")


def exercises(cfg: ListsSource) -> Iterator[Exercise]:
    """Exercises without end, in an order that the seed fixes."""
    rng = np.random.default_rng(cfg.seed)
    while True:
        length = int(rng.integers(cfg.min_length, cfg.max_length + 1))
        # New words come from behind the list: none of them was in it.
        order = [WORDS[i] for i in rng.permutation(cfg.words)]
        words, fresh = order[:length], order[length:]
        edits: list[Edit] = []
        now = words
        for _ in range(cfg.edits):
            edits.append(_draw(cfg.operations[rng.integers(len(cfg.operations))], now, fresh, rng))
            now = edited(now, edits[-1])
        yield Exercise(words, edits)


def _draw(
    operation: Operation, words: list[str], fresh: list[str], rng: np.random.Generator
) -> Edit:
    """An edit that changes the list; a new word is taken out of `fresh`."""
    at = int(rng.integers(len(words)))
    if operation == "insert":
        return Edit(operation, fresh.pop(), words[at])
    if operation == "delete":
        return Edit(operation, words[at])
    if operation == "replace":
        return Edit(operation, words[at], fresh.pop())
    # Behind any other word or to the front, but not where it is.
    places = [word for word in ["", *words] if word != words[at]]
    del places[at]
    return Edit(operation, words[at], places[rng.integers(len(places))])
