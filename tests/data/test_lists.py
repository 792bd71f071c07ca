"""List-editing documents: every answer is right, seeds fix them, splits share none."""

from __future__ import annotations

import itertools
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from abf.artifacts import DOCUMENTS, check_schema
from abf.data.config import WORDS, ListsSource, PrepareConfig
from abf.data.lists import Edit, Exercise, edited, exercises, parse
from abf.data.prepare import prepare
from abf.data.sources import fetch
from abf.errors import DataError

OPERATIONS = ("insert", "delete", "replace", "move")


def by_text(line: str, edits: str) -> str:
    """Oracle: the edits made on the line as text, word by word between spaces."""
    text = f" {line} "
    for edit in edits.split("; "):
        verb, word, *rest = edit.split(" ")
        if verb == "replace":
            text = text.replace(f" {word} ", f" {rest[1]} ")
            continue
        if verb != "insert":
            text = text.replace(f" {word} ", " ")
        if verb != "delete":
            at_front = rest == ["to", "front"]
            before = " " if at_front else f" {rest[1]} "
            text = text.replace(before, f"{before}{word} ", 1)
    return text.strip()


def documents(cfg: ListsSource, out: Path) -> list[str]:
    out.mkdir()
    fetch(cfg, out)
    return pq.read_table(out / "raw").column("text").to_pylist()


sources = st.builds(
    lambda low, more, edits, spare, operations, seed: ListsSource(
        seed=seed,
        words=low + more + edits + spare,
        min_length=low + edits,
        max_length=low + edits + more,
        edits=edits,
        operations=tuple(operations),
    ),
    low=st.integers(2, 5),
    more=st.integers(0, 5),
    edits=st.integers(1, 4),
    spare=st.integers(4, 10),
    operations=st.sets(st.sampled_from(OPERATIONS), min_size=1),
    seed=st.integers(0, 99),
)


@given(cfg=sources)
@settings(max_examples=60, deadline=None)
def test_every_answer_follows_from_its_edits(cfg: ListsSource) -> None:
    for one in itertools.islice(exercises(cfg), 30):
        list_line, edit_line, nothing = str(one).split("\n")
        assert nothing == ""
        assert list_line == f"list: {' '.join(one.words)}"
        edits = edit_line.removeprefix("edit: ")
        assert by_text(" ".join(one.words), edits) == " ".join(one.answer)
        assert parse(str(one)) == one

        assert cfg.min_length <= len(one.words) <= cfg.max_length
        assert len(set(one.words)) == len(one.words)
        assert len(set(one.answer)) == len(one.answer) >= 1
        assert {*one.words, *one.answer} <= set(WORDS[: cfg.words])
        assert len(one.edits) == cfg.edits
        assert {edit.operation for edit in one.edits} <= set(cfg.operations)
        now = list(one.words)
        for edit in one.edits:
            before, now = now, edited(now, edit)
            assert now != before, f"{edit} changes nothing"


def test_operations_are_equally_often_and_lists_of_every_length() -> None:
    some = list(itertools.islice(exercises(ListsSource(seed=1)), 4000))
    for operation in OPERATIONS:
        share = sum(one.edits[0].operation == operation for one in some) / 4000
        assert share == pytest.approx(0.25, abs=0.03)  # four standard deviations
    for length in range(3, 9):
        assert sum(len(one.words) == length for one in some) / 4000 == pytest.approx(
            1 / 6, abs=0.025
        )


def test_a_document_as_it_is_written(tmp_path: Path) -> None:
    cfg = ListsSource(max_documents=2, edits=2, min_length=4, max_length=4)
    counts = fetch(cfg, tmp_path)
    table = pq.read_table(tmp_path / "raw")
    check_schema(table.schema, DOCUMENTS, tmp_path)
    # What a seed stands for must not change unseen.
    assert table.column("text").to_pylist() == [
        "list: bay brick cup coin\nedit: replace cup by drum; delete drum\nanswer: bay brick coin",
        "list: card crow chair bow\nedit: insert boat after bow; move card after crow\n"
        "answer: crow card chair bow boat",
    ]
    assert table.column("doc_id").to_pylist() == ["0", "1"]
    assert set(table.column("licence").to_pylist()) == {"CC0-1.0"} == {counts["licence"]}
    assert set(table.column("source").to_pylist()) == {"lists"}
    assert set(table.column("language").to_pylist()) == {"en"}
    assert counts["n_documents"] == 2


def test_seeds_fix_documents_and_more_documents_change_none(tmp_path: Path) -> None:
    ten = documents(ListsSource(max_documents=10, seed=3), tmp_path / "a")
    again = documents(ListsSource(max_documents=25, seed=3), tmp_path / "b")
    other = documents(ListsSource(max_documents=10, seed=4), tmp_path / "c")
    assert ten == again[:10]
    assert not set(ten) & set(other)


def test_splits_share_no_prompt_however_few_there_are(tmp_path: Path) -> None:
    cfg = ListsSource(
        max_documents=2000, words=5, min_length=3, max_length=3, operations=("delete", "insert")
    )
    (tmp_path / "out").mkdir()
    every = documents(cfg, tmp_path / "raw")
    counts = prepare(
        PrepareConfig(min_chars=1, heldout_fraction=0.3), [tmp_path / "raw"], tmp_path / "out"
    )
    prompts = {
        split: [
            text.rpartition("\n")[0]
            for path in sorted((tmp_path / "out" / "documents").glob(f"{split}-*"))
            for text in pq.read_table(path).column("text").to_pylist()
        ]
        for split in ("train", "heldout")
    }
    assert counts["n_duplicates"] == 2000 - len(set(every)) > 0
    assert len({*prompts["train"], *prompts["heldout"]}) == len(set(every))
    assert len(prompts["train"]) + len(prompts["heldout"]) == len(set(every))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (Edit("delete", "owl"), "'delete owl' of the list 'ant bee': 'owl' is not there"),
        (Edit("move", "ant", "owl"), "'move ant after owl' .* 'owl' is not there"),
        (Edit("insert", "bee", "ant"), "'insert bee after ant' .* 'bee' is there already"),
        (Edit("replace", "ant", "bee"), "'replace ant by bee' .* 'bee' is there already"),
        (Edit("replace", "owl", "elm"), "'replace owl by elm' .* 'owl' is not there"),
    ],
)
def test_edits_that_cannot_be_made(edit: Edit, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _ = Exercise(["ant", "bee"], [edit]).answer


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("Once upon a time", "'Once upon a time' is no list with edits"),
        ("list: ant\nedit: delete ant", "is no list with edits"),
        ("list: ant\nedit: eat ant\n", "'eat ant' is no edit; edits are insert, delete"),
        ("list: ant\nedit: delete ant, delete bee\n", "'delete ant, delete bee' is no edit"),
        ("list: ant bee\nedit: insert elm to front\n", "'insert elm to front' is no edit"),
    ],
)
def test_other_text_is_no_exercise(prompt: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse(prompt)


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"min_length": 9}, "min_length=9 is more than max_length=8"),
        ({"edits": 2}, "edits=2 can leave a list of min_length=3 too short"),
        ({"words": 8}, r"words=8 is less than max_length \+ edits = 9"),
        ({"words": 65}, "less than or equal to 64"),
        ({"operations": ()}, "at least 1 item"),
        ({"operations": ("swap",)}, "'insert', 'delete', 'replace' or 'move'"),
    ],
)
def test_settings_that_leave_nothing_to_ask(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ListsSource.model_validate(settings_)


def test_words_are_64_different_ones() -> None:
    assert len(set(WORDS)) == len(WORDS) == 64
    assert all(word.isalpha() and word.islower() for word in WORDS)
