"""Answers to list-editing documents: right or wrong as a whole, and how many words away.

The right answer comes from the prompt, by making its edits again (`abf.data.lists`), never from a
model. A document counts for every operation that it asks for.
"""

from __future__ import annotations

import typing
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from abf.data.config import Operation
from abf.data.lists import answer_line, parse
from abf.eval.base import Measure, Subject
from abf.eval.config import ListsTask
from abf.eval.costs import column, read_decode


class Lists:
    """See the module."""

    version = 1

    def measure(self, subject: Subject, decoded: Path | None) -> list[Measure]:
        """Figures of one decode."""
        assert decoded is not None, "answers are scored from their decode"
        found = read_decode(decoded, subject)
        samples, ratio = found.samples, found.ratio
        asked = [parse(sample["prompt"]) for sample in samples]
        wanted = [answer_line(one.answer) for one in asked]
        answers = list(zip(samples, wanted, strict=True))
        exact = column(given["finished"] and given["text"] == line for given, line in answers)
        words = [(given["text"].split(), line.split()) for given, line in answers]
        length = column(len(line) for _, line in words)
        same = column(len(given) == len(line) for given, line in words)
        wrong = column(edit_distance(given, line) for given, line in words)
        measures = [
            ratio("exact_match", "share", exact),
            ratio("word_errors", "errors/word", wrong, length),
            ratio("right_length", "share", same),
        ]
        for operation in typing.get_args(Operation):
            holds = column(operation in {e.operation for e in one.edits} for one in asked)
            measures += [
                ratio(f"exact_match_{operation}", "share", exact * holds, holds),
                ratio(f"word_errors_{operation}", "errors/word", wrong * holds, length * holds),
            ]
        return [*measures, *found.costs]


def edit_distance(given: Sequence[str], wanted: Sequence[str]) -> int:
    """Fewest insertions, deletions and replacements of words between two texts (Levenshtein)."""
    row = np.arange(len(wanted) + 1)
    for count, word in enumerate(given, start=1):
        changed = row[:-1] + [word != other for other in wanted]
        best = np.minimum(np.append(count, changed), np.append(count, row[1:] + 1))
        # What is missing from `given` costs one a word, from wherever the row is lowest.
        steps = np.arange(len(best))
        row = np.minimum.accumulate(best - steps) + steps
    return int(row[-1])


def build(cfg: ListsTask) -> Lists:
    """The task of its config."""
    return Lists()
