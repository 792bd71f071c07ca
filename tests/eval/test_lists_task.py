"""Answers to list-editing documents: scored by hand, and from a real decode."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from abf.artifacts import SAMPLES, TOKENS, read_table
from abf.data.config import ListsSource
from abf.data.lists import answer_line, exercises
from abf.data.tokenizer import load_tokenizer
from abf.decode.config import ArStrategy, DecoderConfig
from abf.errors import ConfigError, DataError
from abf.eval import lists
from abf.eval.base import Measure, Ratio
from abf.eval.config import ListsTask
from abf.eval.costs import Decoded
from abf.eval.lists import Lists, edit_distance
from abf.segment.config import LineSegmenter
from tests.eval.corpus import Corpus, build_corpus, decode_stage
from tests.eval.test_likelihood import subject, value

TASK = ListsTask(prompts=6, new_tokens=12)
DECODER = DecoderConfig(strategy=ArStrategy(), precision="fp32")


def distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    """Oracle: Levenshtein's recursion."""

    @functools.cache
    def at(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        return min(at(i - 1, j) + 1, at(i, j - 1) + 1, at(i - 1, j - 1) + (a[i - 1] != b[j - 1]))

    return at(len(a), len(b))


@given(*[st.lists(st.sampled_from("abc"), max_size=7).map(tuple)] * 2)
def test_edit_distance(a: tuple[str, ...], b: tuple[str, ...]) -> None:
    assert edit_distance(a, b) == distance(a, b)


def measured(rows: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> dict[str, Measure]:
    monkeypatch.setattr(lists, "read_decode", lambda decoded, subject: Decoded(rows, ()))
    found = Lists().measure(None, Path())  # pyright: ignore[reportArgumentType]
    return {measure.metric: measure for measure in found}


def sample(number: int, prompt: str, text: str, finished: bool = True) -> dict[str, Any]:
    return {"prompt_id": f"d{number}", "prompt": prompt, "text": text, "finished": finished}


def test_scores_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    insert = "list: ant bee\nedit: insert elm after ant\n"  # -> ant elm bee
    both = "list: ant bee elm\nedit: delete bee; move elm to front\n"  # -> elm ant
    rows = [
        sample(0, insert, "answer: ant elm bee"),
        sample(1, insert, "answer: ant bee"),  # a word is missing
        sample(2, insert, "answer: ant elm bee", finished=False),  # it did not end there
        sample(3, both, "answer: elm ant"),
        sample(4, both, "answer: ant elm"),  # two words wrong
        sample(5, both, "answer: elm ant\nlist: bee"),  # it went on
    ]
    found = measured(rows, monkeypatch)
    assert value(found["exact_match"]) == 2 / 6
    assert value(found["word_errors"]) == (0 + 1 + 0 + 0 + 2 + 2) / (3 * 4 + 3 * 3)
    assert value(found["right_length"]) == 4 / 6
    assert value(found["exact_match_insert"]) == 1 / 3
    assert value(found["exact_match_delete"]) == value(found["exact_match_move"]) == 1 / 3
    assert value(found["word_errors_insert"]) == 1 / 12
    assert value(found["word_errors_delete"]) == value(found["word_errors_move"]) == 4 / 9
    exact = found["exact_match_insert"]
    assert isinstance(exact, Ratio)
    assert list(exact.documents) == [f"d{n}" for n in range(6)]
    assert exact.denominator.tolist() == [1, 1, 1, 0, 0, 0]
    # Nobody asked for a replacement: nothing to divide by.
    none = found["exact_match_replace"]
    assert isinstance(none, Ratio)
    assert none.denominator.sum() == 0


def test_other_text_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match="'Once upon' is no list with edits"):
        measured([sample(0, "Once upon", "a time")], monkeypatch)


# --- from held-out documents --------------------------------------------------------------------


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    some = itertools.islice(exercises(ListsSource(max_length=5, words=12)), 80)
    texts = [f"{one}{answer_line(one.answer)}" for one in some]
    root = tmp_path_factory.mktemp("lists")
    return build_corpus(root, segmenter=LineSegmenter(), row_length=48, everything=texts)


def decoded(corpus: Corpus, directory: Path, task: ListsTask = TASK) -> Path:
    return decode_stage(corpus, directory, task, DECODER)


def test_prompts_are_the_first_two_lines_of_documents_from_the_whole_split(
    corpus: Corpus, tmp_path: Path
) -> None:
    rows = read_table(decoded(corpus, tmp_path) / "samples.parquet", SAMPLES).to_pylist()
    tokenizer = load_tokenizer(corpus.tokenizer / "tokenizer")
    held_out = read_table(corpus.tokens / "tokens" / "heldout-00000.parquet", TOKENS).to_pylist()
    wanted = [held_out[number * len(held_out) // 6] for number in range(6)]
    assert [row["prompt_id"] for row in rows] == [document["doc_id"] for document in wanted]
    for row, document in zip(rows, wanted, strict=True):
        lines = tokenizer.decode(document["token_ids"]).splitlines(keepends=True)
        assert len(lines) == 3
        assert row["prompt"] == "".join(lines[:2])
        assert row["prompt_ids"] == document["token_ids"][: len(row["prompt_ids"])]


def test_figures_of_a_decode(corpus: Corpus, tmp_path: Path) -> None:
    directory = decoded(corpus, tmp_path)
    rows = read_table(directory / "samples.parquet", SAMPLES).to_pylist()
    found = {m.metric: m for m in Lists().measure(subject(corpus), directory)}
    tokens, nfe = sum(len(r["token_ids"]) for r in rows), sum(r["nfe"] for r in rows)
    assert value(found["tokens_per_forward"]) == tokens / nfe
    assert value(found["exact_match"]) == 0  # weights are random
    assert value(found["word_errors"]) > 0
    assert value(found["finished_share"]) == sum(r["finished"] for r in rows) / 6


def test_too_few_documents_of_enough_lines(corpus: Corpus, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"prompts=41: only 40 held-out documents have 2 lines"):
        decoded(corpus, tmp_path, ListsTask(prompts=41, new_tokens=4))
