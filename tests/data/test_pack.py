"""Packing against a plain reading of its rules, token by token."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from abf.artifacts import SEGMENTS, TOKENS, write_table
from abf.blocks import block_lengths
from abf.data.config import PackConfig
from abf.data.loader import PackedBatch, PackedRows
from abf.data.pack import first_fit, pack
from abf.errors import ArtifactError


@dataclass
class Doc:
    """A made-up document: byte lengths of its tokens, and where its segments start."""

    widths: list[int]
    starts: list[int]
    ids: list[int] = field(default_factory=list)


def write(root: Path, split: str, shards: list[list[Doc]], *, n_ids: int = 599) -> None:
    """Token and segment stage directories below `root`."""
    number = 0
    for shard, docs in enumerate(shards):
        names = [f"{split}-{shard}.{n}" for n in range(len(docs))]
        for doc in docs:
            doc.ids = [1 + (number + i) % n_ids for i in range(len(doc.widths))]
            number += len(doc.widths)
        byte_start = [np.cumsum([0, *doc.widths])[:-1].tolist() for doc in docs]
        tokens = {
            "doc_id": names,
            "token_ids": [doc.ids for doc in docs],
            "char_start": byte_start,
            "byte_start": byte_start,
            "n_bytes": [sum(doc.widths) for doc in docs],
        }
        table = pa.table([pa.array(tokens[f.name], f.type) for f in TOKENS], schema=TOKENS)
        write_table(root / f"tokens/tokens/{split}-{shard:05d}.parquet", table, TOKENS)
        segments = {
            "doc_id": names,
            "segment_start": [doc.starts for doc in docs],
            "boundary_score": [[1.0] * len(doc.starts) for doc in docs],
            "level": [[0] * len(doc.starts) for doc in docs],
        }
        table = pa.table([pa.array(segments[f.name], f.type) for f in SEGMENTS], schema=SEGMENTS)
        write_table(root / f"segments/segments/{split}-{shard:05d}.parquet", table, SEGMENTS)


def run(root: Path, tokenizer: Path, L: int, S: int) -> dict[str, int | float | str]:
    (root / "out").mkdir()
    cfg = PackConfig(row_length=L, max_block=S)
    return pack(cfg, root / "tokens", root / "segments", tokenizer, root / "out")


def read(root: Path, split: str) -> tuple[PackedBatch, list[dict[str, Any]], PackedRows]:
    rows = PackedRows(root / f"out/packed/{split}.arrow")
    pieces = pq.read_table(root / f"out/packed/{split}.pieces.parquet").to_pylist()
    return rows.rows(np.arange(len(rows))), pieces, rows


def brute_first_fit(sizes: list[int], L: int) -> list[tuple[int, int]]:
    used: list[int] = []
    places = []
    for size in sizes:
        row = next((r for r, u in enumerate(used) if u + size <= L), len(used))
        if row == len(used):
            used.append(0)
        places.append((row, used[row]))
        used[row] += size
    return places


def brute_blocks(doc: Doc, low: int, high: int, cap: int) -> list[int]:
    """Block number of each slot of doc[low:high], from 0: cut where a segment or the piece starts,
    then each stretch into near-equal parts."""
    blocks: list[int] = []
    slot = low
    while slot < high:
        end = min([s for s in doc.starts if s > slot] + [high])
        for length in block_lengths([end - slot], cap).tolist():
            blocks += [blocks[-1] + 1 if blocks else 0] * length
        slot = end
    return blocks


@st.composite
def documents(draw: st.DrawFn, longest: int = 40) -> list[list[Doc]]:
    """One to three shards of documents."""

    def doc() -> Doc:
        n = draw(st.integers(0, longest))
        widths = draw(st.lists(st.integers(1, 4), min_size=n, max_size=n))
        cuts = draw(st.sets(st.integers(1, n), max_size=n)) if n else set()
        return Doc(widths, [0, *sorted(cuts)])

    return [[doc() for _ in range(draw(st.integers(1, 6)))] for _ in range(draw(st.integers(1, 3)))]


@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(shards=documents(), L=st.sampled_from([8, 9, 16, 33]), S=st.integers(1, 12))
def test_rows_against_a_plain_reading(
    shards: list[list[Doc]],
    L: int,
    S: int,
    tokenizer: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    root = tmp_path_factory.mktemp("pack")
    write(root, "train", shards)
    write(root, "heldout", [[Doc([1, 2], [0])]])
    counts = run(root, tokenizer, L, S)
    batch, pieces, _ = read(root, "train")

    expected = []
    for shard, docs in enumerate(shards):
        for n, doc in enumerate(docs):
            slots, ends = len(doc.widths) + 1, np.cumsum([0, *doc.widths]).tolist()
            for part, low in enumerate(range(0, slots, L - 1)):
                high = min(low + L - 1, slots)
                n_bytes = (ends[high] if high < slots else ends[-1]) - ends[low]
                blocks = brute_blocks(doc, low, high, S)
                ids = [*doc.ids, 0][low:high]
                expected.append((f"train-{shard}.{n}", part, ids, blocks, n_bytes))
    places = brute_first_fit([len(ids) + 1 for _, _, ids, _, _ in expected], L)
    shape = (max(row for row, _ in places) + 1, L)
    token_ids = np.zeros(shape, int)
    block_id, document_id = np.full(shape, -1), np.full(shape, -1)
    next_block = np.zeros(shape[0], int)
    for number, (name, part, ids, blocks, n_bytes) in enumerate(expected):
        row, column = places[number]
        here = slice(column, column + len(ids) + 1)
        token_ids[row, here] = [0, *ids]
        document_id[row, here] = number
        front = next_block[row]
        block_id[row, here] = [front, *(front + 1 + b for b in blocks)]
        next_block[row] = block_id[row, here][-1] + 1
        assert pieces[number] == {
            "document_id": number,
            "doc_id": name,
            "part": part,
            "row": row,
            "start": column,
            "n_tokens": len(ids) + 1,
            "n_bytes": n_bytes,
            "n_blocks": blocks[-1] + 1,
        }
    assert len(pieces) == len(expected)
    np.testing.assert_array_equal(batch.token_ids, token_ids)
    np.testing.assert_array_equal(batch.document_id, document_id)
    np.testing.assert_array_equal(batch.block_id, block_id)

    parts = [-(-(len(doc.widths) + 1) // (L - 1)) for docs in shards for doc in docs]
    assert counts["train_long_documents"] == sum(n > 1 for n in parts)
    assert counts["train_extra_cuts"] == sum(n - 1 for n in parts)
    assert counts["train_rows"] == shape[0]
    assert counts["train_blocks"] == sum(piece["n_blocks"] for piece in pieces)
    total_bytes = sum(sum(doc.widths) for docs in shards for doc in docs)
    assert sum(piece["n_bytes"] for piece in pieces) == total_bytes


@given(sizes=st.lists(st.integers(1, 20), max_size=60))
def test_first_fit(sizes: list[int]) -> None:
    rows, columns, n_rows = first_fit(sizes, 20)
    places = brute_first_fit(sizes, 20)
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == places
    assert n_rows == len({row for row, _ in places})


def test_real_text_comes_back_whole(tokens: Path, tokenizer: Path, tmp_path: Path) -> None:
    """Row by row, the pieces of every document in order spell it, each ended by one closing token;
    and two segmenters give the same rows except for the blocks."""
    batches = {}
    for arm, step in (("a", 7), ("b", 19)):
        root = tmp_path / arm
        (root / "out").mkdir(parents=True)
        for path in sorted((tokens / "tokens").iterdir()):
            table = pq.read_table(path)
            starts = [list(range(0, len(ids) + 1, step)) for ids in table["token_ids"].to_pylist()]
            columns = [
                table["doc_id"],
                pa.array(starts, pa.list_(pa.uint32())),
                pa.array([[1.0] * len(s) for s in starts], pa.list_(pa.float32())),
                pa.array([[0] * len(s) for s in starts], pa.list_(pa.uint8())),
            ]
            made = pa.table(columns, names=SEGMENTS.names)
            write_table(root / "segments" / path.name, made, SEGMENTS)
        pack(PackConfig(row_length=64, max_block=16), tokens, root, tokenizer, root / "out")
        batches[arm] = read(root, "train")
    batch, pieces, rows = batches["a"]
    other = batches["b"][0]
    np.testing.assert_array_equal(batch.token_ids, other.token_ids)
    np.testing.assert_array_equal(batch.document_id, other.document_id)
    assert (batch.block_id != other.block_id).any()
    assert (rows.row_length, rows.max_block, rows.vocab_size, rows.document_token) == (
        64, 16, 600, 0,
    )  # fmt: skip

    spelled: dict[str, list[int]] = {}
    n_bytes: dict[str, int] = {}
    for piece in pieces:
        start, end = piece["start"], piece["start"] + piece["n_tokens"]
        here = batch.token_ids[piece["row"], start:end].tolist()
        assert here[0] == 0
        assert set(batch.document_id[piece["row"], start:end]) == {piece["document_id"]}
        spelled.setdefault(piece["doc_id"], []).extend(here[1:])
        n_bytes[piece["doc_id"]] = n_bytes.get(piece["doc_id"], 0) + piece["n_bytes"]
    originals = {
        row["doc_id"]: row
        for path in sorted((tokens / "tokens").glob("train-*"))
        for row in pq.read_table(path).to_pylist()
    }
    assert list(spelled) == list(originals)
    assert any(piece["part"] for piece in pieces)
    for name, row in originals.items():
        assert spelled[name] == [*row["token_ids"], 0]
        assert n_bytes[name] == row["n_bytes"]


def test_packed_files_do_not_depend_on_the_run(tokenizer: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        for split in ("train", "heldout"):
            write(tmp_path / name, split, [[Doc([1] * 20, [0, 5]), Doc([2] * 3, [0])]])
        run(tmp_path / name, tokenizer, 16, 4)
    for split in ("train", "heldout"):
        for ending in ("arrow", "pieces.parquet"):
            one, two = (tmp_path / n / f"out/packed/{split}.{ending}" for n in ("one", "two"))
            assert one.read_bytes() == two.read_bytes()
    left = sorted(path.name for path in (tmp_path / "one/out/packed").iterdir())
    assert left == [
        "heldout.arrow",
        "heldout.pieces.parquet",
        "train.arrow",
        "train.pieces.parquet",
    ]


# --- inputs that do not belong together -----------------------------------------------------------


def refused(root: Path, tokenizer: Path) -> str:
    with pytest.raises(ArtifactError) as caught:
        run(root, tokenizer, 16, 4)
    assert not list((root / "out").glob("packed/*.arrow"))
    return str(caught.value)


@pytest.mark.parametrize("wrong", [600, 0])
def test_tokens_of_another_tokenizer(wrong: int, tokenizer: Path, tmp_path: Path) -> None:
    write(tmp_path, "heldout", [[Doc([1], [0])]])
    write(tmp_path, "train", [[Doc([1] * 4, [0]), Doc([1] * 5, [0])]])
    path = tmp_path / "tokens/tokens/train-00000.parquet"
    table = pq.read_table(path)
    ids = [[1, 2, 3, 4], [5, 6, wrong, 7, 8]]
    column = pa.array(ids, pa.list_(pa.uint32()))
    write_table(path, table.set_column(1, "token_ids", column), TOKENS)
    message = refused(tmp_path, tokenizer)
    assert f"train-00000.parquet, document train-0.1: token id {wrong} " in message
    assert "600 entries" in message


@pytest.mark.parametrize("starts", [[], [1, 3], [0, 3, 3], [0, 5, 2], [0, 6]])
def test_impossible_segments(starts: list[int], tokenizer: Path, tmp_path: Path) -> None:
    write(tmp_path, "heldout", [[Doc([1], [0])]])
    write(tmp_path, "train", [[Doc([1] * 3, [0, 3]), Doc([1] * 5, starts), Doc([1], [0, 1])]])
    message = refused(tmp_path, tokenizer)
    assert "segments/train-00000.parquet, document train-0.1: segment_start" in message
    assert f"below 6 (text tokens plus the closing one), found {starts}" in message


def test_segments_of_other_documents(tokenizer: Path, tmp_path: Path) -> None:
    write(tmp_path, "heldout", [[Doc([1], [0])]])
    write(tmp_path, "train", [[Doc([1], [0]), Doc([1], [0])]])
    path = tmp_path / "segments/segments/train-00000.parquet"
    write_table(path, pq.read_table(path).slice(0, 1), SEGMENTS)
    assert "has other documents than" in refused(tmp_path, tokenizer)


def test_truncated_tokens(tokenizer: Path, tmp_path: Path) -> None:
    for split in ("train", "heldout"):
        write(tmp_path, split, [[Doc([1] * 50, [0])]])
    path = tmp_path / "tokens/tokens/train-00000.parquet"
    path.write_bytes(path.read_bytes()[:-40])
    assert "train-00000.parquet cannot be read" in refused(tmp_path, tokenizer)


def test_full_disk(tokenizer: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for split in ("train", "heldout"):
        write(tmp_path, split, [[Doc([1] * 50, [0])]])
    monkeypatch.setattr("os.posix_fallocate", full)
    message = refused(tmp_path, tokenizer)
    assert "disk full while writing" in message
    assert "train.arrow" in message
    assert list((tmp_path / "out/packed").iterdir()) == []
