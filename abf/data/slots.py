"""Documents as slots: a shard's tokens with the closing document tokens, joined to its segments.

A document of n text tokens has n + 1 slots; the last one is the document token that ends it. All
arrays are flat over the shard's documents, in their order.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from abf.artifacts import SEGMENTS, TOKENS, read_table
from abf.data.tokenizer import TextTokenizer
from abf.errors import ArtifactError

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Shard:
    """One shard; slot numbers run over all its documents."""

    doc_ids: list[str]
    n_slots: IntArray
    """Slots of each document: int64 [documents]."""
    token_ids: npt.NDArray[np.uint32]
    """Token of each slot: [slots]."""
    byte_start: IntArray
    """Byte offset of each slot in its document; the closing slot has the document's length."""
    segment_start: IntArray
    """Slot where each segment starts: int64 [segments]."""


def read_slots(
    token_files: list[Path], segments: Path, tokenizer: TextTokenizer
) -> Iterator[Shard]:
    """Read shards one after the other.

    Args:
        token_files: `tokens/{split}-*.parquet`.
        segments: folder that holds a file of the same name for each of them.

    Raises:
        ArtifactError: the files do not belong together; names file, document and value.
    """
    for path in token_files:
        yield _join(path, segments / path.name, tokenizer)


def _join(token_path: Path, segment_path: Path, tokenizer: TextTokenizer) -> Shard:
    tokens, segments = read_table(token_path, TOKENS), read_table(segment_path, SEGMENTS)
    doc_ids: list[str] = tokens.column("doc_id").to_pylist()
    if segments.column("doc_id").to_pylist() != doc_ids:
        raise ArtifactError(f"{segment_path} has other documents than {token_path}; rerun segment")
    ids, n_text = flat_lists(tokens, "token_ids")
    _check_ids(ids, n_text, doc_ids, token_path, tokenizer)
    n_slots = n_text + 1
    closing = np.cumsum(n_slots) - 1
    is_text = np.ones(int(n_slots.sum()), dtype=bool)
    is_text[closing] = False
    slots = np.full(len(is_text), tokenizer.document_id, dtype=np.uint32)
    slots[is_text] = ids
    bytes_ = np.empty(len(is_text), dtype=np.int64)
    bytes_[is_text] = flat_lists(tokens, "byte_start")[0]
    bytes_[closing] = tokens.column("n_bytes").to_numpy()
    starts = _segment_starts(segments, n_slots, doc_ids, segment_path)
    return Shard(doc_ids, n_slots, slots, bytes_, starts)


def flat_lists(table: pa.Table, name: str) -> tuple[npt.NDArray[np.uint32], IntArray]:
    """Values of a list column end to end, and the length of each list."""
    chunks = table.column(name).chunks
    values = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in chunks]
    lengths = [chunk.value_lengths().to_numpy(zero_copy_only=False) for chunk in chunks]
    if not chunks:
        return np.empty(0, np.uint32), np.empty(0, np.int64)
    return np.concatenate(values), np.concatenate(lengths).astype(np.int64)


def _check_ids(
    ids: npt.NDArray[np.uint32],
    n_text: IntArray,
    doc_ids: list[str],
    path: Path,
    tokenizer: TextTokenizer,
) -> None:
    wrong = np.flatnonzero((ids >= tokenizer.vocab_size) | (ids == tokenizer.document_id))
    if wrong.size:
        owner = int(np.searchsorted(np.cumsum(n_text), wrong[0], side="right"))
        raise ArtifactError(
            f"{path}, document {doc_ids[owner]}: token id {ids[wrong[0]]} is no text token of a "
            f"tokenizer with {tokenizer.vocab_size} entries whose document token is "
            f"{tokenizer.document_id}; the tokens were made by another tokenizer, rerun tokenize"
        )


def _segment_starts(
    segments: pa.Table, n_slots: IntArray, doc_ids: list[str], path: Path
) -> IntArray:
    """Starts as slot numbers of the shard, after checking each document's starts."""
    values, count = flat_lists(segments, "segment_start")
    owner = np.repeat(np.arange(len(count)), count)
    starts = values.astype(np.int64)
    is_first = np.ones(len(starts), dtype=bool)
    is_first[1:] = owner[1:] != owner[:-1]
    bad = np.zeros(len(count), dtype=bool)
    bad[count == 0] = True
    bad[owner[is_first & (starts != 0)]] = True
    bad[owner[starts >= n_slots[owner]]] = True
    bad[owner[1:][~is_first[1:] & (np.diff(starts) <= 0)]] = True
    if bad.any():
        document = int(bad.argmax())
        raise ArtifactError(
            f"{path}, document {doc_ids[document]}: segment_start must begin with 0 and increase "
            f"below {n_slots[document]} (text tokens plus the closing one), found "
            f"{starts[owner == document][:8].tolist()}; rerun segment"
        )
    return starts + (np.cumsum(n_slots) - n_slots)[owner]
