"""Cleaning, deduplication and the split."""

from __future__ import annotations

import hashlib
import os
import random
import string
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from abf.artifacts import DOCUMENTS, check_schema, shards, write_table
from abf.data.config import PrepareConfig
from abf.data.prepare import clean, prepare
from abf.errors import ArtifactError, DataError

SPLITS = ("train", "heldout")


def raw(root: Path, name: str, texts: list[str], *, files: int = 1) -> Path:
    """A stage directory of `fetch`."""
    directory = root / name
    size = -(-len(texts) // files)
    for number in range(files):
        part = texts[number * size : (number + 1) * size]
        table = pa.table(
            {
                "doc_id": [f"{number}.{n}" for n in range(len(part))],
                "text": part,
                "source": [name] * len(part),
                "licence": [f"licence of {name}"] * len(part),
                "language": ["en"] * len(part),
            }
        )
        write_table(directory / "raw" / f"part-{number:05d}.parquet", table, DOCUMENTS)
    return directory


def run(
    tmp_path: Path, name: str, cfg: PrepareConfig, sources: list[Path]
) -> tuple[dict[str, list[dict[str, str]]], dict[str, int | float | str]]:
    out = tmp_path / name
    out.mkdir()
    counts = prepare(cfg, sources, out)
    rows = {
        split: [
            row for p in shards(out / "documents", split) for row in pq.read_table(p).to_pylist()
        ]
        for split in SPLITS
    }
    return rows, counts


def words(seed: int, n: int = 200) -> list[str]:
    rng = random.Random(seed)
    return [
        " ".join("".join(rng.choices(string.ascii_lowercase, k=5)) for _ in range(20))
        for _ in range(n)
    ]


def test_split_order_ids_and_duplicates_against_a_plain_reading(tmp_path: Path) -> None:
    first, second = words(1), words(2)
    second[3], second[7] = first[10], second[6]
    sources = [raw(tmp_path, "Corpus One==1.0", first, files=3), raw(tmp_path, "two", second)]
    cfg = PrepareConfig(heldout_fraction=0.2, shard_documents=64)
    rows, counts = run(tmp_path, "out", cfg, sources)

    expected: dict[str, list[tuple[str, str, str]]] = {split: [] for split in SPLITS}
    seen = set()
    for source, slug, texts in (
        ("Corpus One==1.0", "corpus-one-1-0", first),
        ("two",) * 2 + (second,),
    ):
        for text in texts:
            digest = hashlib.blake2b(text.encode(), digest_size=10).hexdigest()
            if text not in seen:
                share = int(digest[:16], 16) / 2**64
                expected["heldout" if share < 0.2 else "train"].append(
                    (f"{slug}-{digest}", text, source)
                )
            seen.add(text)
    found = {s: [(r["doc_id"], r["text"], r["source"]) for r in rows[s]] for s in SPLITS}
    assert found == expected
    assert counts["n_duplicates"] == 2
    assert counts["n_read"] == 400
    assert counts["train_documents"] == len(rows["train"])
    assert counts["heldout_bytes"] == sum(len(row["text"]) for row in rows["heldout"])
    ids = [row["doc_id"] for split in SPLITS for row in rows[split]]
    assert len(set(ids)) == len(ids) == 398
    sizes = [pq.read_metadata(p).num_rows for p in shards(tmp_path / "out/documents", "train")]
    assert sizes[:-1] == [64] * (len(sizes) - 1)
    check_schema(
        pq.read_schema(tmp_path / "out/documents/train-00000.parquet"), DOCUMENTS, tmp_path
    )


def test_first_source_of_a_duplicate_wins(tmp_path: Path) -> None:
    texts = words(3)
    sources = [raw(tmp_path, "a", texts), raw(tmp_path, "b", texts[::-1] + words(4))]
    rows, counts = run(tmp_path, "out", PrepareConfig(), sources)
    licence = {row["text"]: row["licence"] for split in SPLITS for row in rows[split]}
    assert {licence[text] for text in texts} == {"licence of a"}
    assert counts["n_duplicates"] == len(texts)


def test_adding_or_reordering_text_moves_no_document(tmp_path: Path) -> None:
    texts = words(5)
    small, _ = run(tmp_path, "small", PrepareConfig(), [raw(tmp_path, "a", texts)])
    more = texts[::-1] + words(6)
    other = [raw(tmp_path, "b", words(7)), raw(tmp_path, "c", more)]
    large, _ = run(tmp_path, "large", PrepareConfig(), other)
    before = {row["text"]: split for split in SPLITS for row in small[split]}
    after = {row["text"]: split for split in SPLITS for row in large[split]}
    assert before == {text: after[text] for text in before}
    assert len(after) == 600


def test_two_runs_write_the_same_bytes(tmp_path: Path) -> None:
    source = raw(tmp_path, "a", words(8))
    for name in ("one", "two"):
        run(tmp_path, name, PrepareConfig(), [source])
    files = sorted(path.name for path in (tmp_path / "one/documents").iterdir())
    assert files == ["heldout-00000.parquet", "train-00000.parquet"]
    for name in files:
        one, two = (tmp_path / run_ / "documents" / name for run_ in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()
    assert [path.name for path in (tmp_path / "one").iterdir()] == ["documents"]


def test_newlines_and_nul() -> None:
    counts: Counter[str] = Counter()
    cfg = PrepareConfig(min_chars=1)
    assert clean("a\r\nb\rc\n\r\nd\0\0e", cfg, counts) == "a\nb\nc\n\nde"
    assert clean("plain\n", cfg, counts) == "plain\n"
    assert counts == {"n_other_newlines": 1, "n_nul_characters": 2}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("one two three", "one two"),
        ("one\ntwo three", "one\ntwo"),
        ("oneXtwo three", "oneXtwo"),
        ("onetwo12 three", "onetwo12"),
        ("onetwo123 three", "onetwo12"),
        ("a bcdefghijklm", "a bcdefg"),
        ("onetwo12", "onetwo12"),
        ("ab\n\n\n\n\n\n\n\n\n\n", None),
    ],
)
def test_long_texts_are_cut_at_a_break(text: str, expected: str | None) -> None:
    cfg = PrepareConfig(min_chars=3, max_chars=8)
    assert clean(text, cfg, Counter()) == expected


def test_short_documents_count_without_surrounding_space() -> None:
    counts: Counter[str] = Counter()
    cfg = PrepareConfig(min_chars=4)
    assert clean("abc" + " " * 50, cfg, counts) is None
    assert clean(" abcd ", cfg, counts) == " abcd "
    assert counts["n_short"] == 1


def test_empty_heldout_split_says_what_to_change(tmp_path: Path) -> None:
    source = raw(tmp_path, "a", [*words(9, 3), "short"])
    with pytest.raises(DataError) as caught:
        run(tmp_path, "out", PrepareConfig(heldout_fraction=1e-9), [source])
    message = str(caught.value)
    for part in (
        "heldout split is empty",
        "4 documents were read",
        "1 were shorter than",
        "3 remain",
    ):
        assert part in message
    assert "raise prepare.heldout_fraction" in message


def test_empty_train_split_says_what_to_change(tmp_path: Path) -> None:
    source = raw(tmp_path, "a", words(9, 3))
    with pytest.raises(DataError, match=r"train split is empty.*lower prepare\.heldout_fraction"):
        run(tmp_path, "out", PrepareConfig(heldout_fraction=1 - 1e-9), [source])


def test_nothing_left(tmp_path: Path) -> None:
    source = raw(tmp_path, "a", ["x", "y"])
    with pytest.raises(DataError, match=r"no document is left: 2 .* min_chars = 64"):
        run(tmp_path, "out", PrepareConfig(), [source])


def test_truncated_or_foreign_raw_files(tmp_path: Path) -> None:
    source = raw(tmp_path, "a", words(10))
    path = source / "raw" / "part-00000.parquet"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"part-00000\.parquet cannot be read"):
        run(tmp_path, "one", PrepareConfig(), [source])
    pq.write_table(pa.table({"text": ["x"]}), path)
    with pytest.raises(ArtifactError, match="licence: found nothing, expected string"):
        run(tmp_path, "two", PrepareConfig(), [source])
    path.unlink()
    with pytest.raises(ArtifactError, match="holds no Parquet file"):
        run(tmp_path, "three", PrepareConfig(), [source])


def test_no_cache_and_no_network(tmp_path: Path) -> None:
    """`datasets` may neither write into the home folder nor mind that there is no network, and a
    folder named like a pattern is only a folder."""
    root, home = tmp_path / "results[1]*", tmp_path / "home"
    root.mkdir()
    home.mkdir()
    raw(root, "a", words(11))
    code = (
        "import socket, sys\n"
        "def refuse(*a, **k): raise AssertionError('network')\n"
        "socket.socket.connect = refuse\n"
        "socket.getaddrinfo = refuse\n"
        "from pathlib import Path\n"
        "from abf.data.config import PrepareConfig\n"
        "from abf.data.prepare import prepare\n"
        "root = Path(sys.argv[1]); (root / 'out').mkdir()\n"
        "print(prepare(PrepareConfig(), [root / 'a'], root / 'out')['n_read'])\n"
    )
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "XDG_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, str(root)],
        env={**kept, "HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "200\n", done.stderr
    assert list(home.iterdir()) == []
    assert "Generating" not in done.stderr
