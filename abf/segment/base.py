"""What every segmenter shares: a document's tokens in, segment starts out, and the stage around it.

A document of n text tokens has n + 1 slots, the last being the closing document token. Segments
cover the slots: starts are slot numbers, the first is 0, and a start of n holds the closing token
alone. A start carries a score in [0, 1] (1: a rule says so) and a level (0 leaf, 1 paragraph).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from abf.artifacts import DOCUMENTS, SEGMENTS, TOKENS, read_table, shards, write_table
from abf.base import build
from abf.errors import ArtifactError
from abf.segment.config import Segmenter
from abf.track.progress import Progress

IntArray = npt.NDArray[np.int64]

SPLITS = ("train", "heldout")


@dataclass(frozen=True, eq=False)
class Document:
    """A document as a segmenter sees it."""

    doc_id: str
    text: str
    language: str
    """Natural or programming language, as the source names it."""
    byte_start: IntArray
    """int [n]: byte of the text where each token starts."""

    @property
    def n_slots(self) -> int:
        """Text tokens and the closing document token."""
        return len(self.byte_start) + 1


@dataclass(frozen=True, eq=False)
class Segments:
    """Segments of one document."""

    start: npt.NDArray[np.uint32]
    """[N], increasing, the first is 0."""
    score: npt.NDArray[np.float32]
    """[N]"""
    level: npt.NDArray[np.uint8]
    """[N]"""

    @classmethod
    def rule(cls, start: npt.ArrayLike, level: npt.ArrayLike | None = None) -> Segments:
        """Segments by rule: score 1 everywhere, level 0 unless given."""
        starts = np.asarray(start, dtype=np.uint32)
        levels = np.zeros(len(starts)) if level is None else np.asarray(level)
        return cls(starts, np.ones(len(starts), np.float32), levels.astype(np.uint8))


class SegmenterLike(Protocol):
    """A segmenter: what `build(cfg, tokens=, reference=, max_block=)` of its kind returns."""

    def donors(self, slots: IntArray) -> IntArray:
        """Whose reference each document of a shard is given: its number in the shard.

        Args:
            slots: int [documents], slots of each; a donor has as many as its document.
        """
        ...

    def segment(self, doc: Document, reference: Segments | None) -> Segments:
        """Cut a document.

        Args:
            reference: the segments that the segmenter named by `like` gave the document's donor.
        """
        ...


class OwnReference:
    """Segmenters that look at nothing but the document itself."""

    def donors(self, slots: IntArray) -> IntArray:
        """Every document is its own donor."""
        return np.arange(len(slots))


def segment(
    cfg: Segmenter,
    documents: Path,
    tokens: Path,
    out: Path,
    reference: Path | None = None,
    max_block: int | None = None,
) -> dict[str, int | float | str]:
    """Write `out`/segments/{split}-*.parquet (SEGMENTS), one file for each file of tokens.

    Args:
        documents, tokens: stage directories of `prepare` and `tokenize`.
        reference: stage directory of `segment` for `cfg.like`, where the kind has it.
        max_block: longest block S, known where there is a reference.

    Returns:
        Split by split: documents, text tokens, segments and their mean length in slots; with a
        reference, the share of cuts inside documents that the reference makes too.

    Raises:
        ArtifactError: the inputs hold different documents.
    """
    segmenter: SegmenterLike = build(cfg, tokens=tokens, reference=reference, max_block=max_block)
    files = {split: shards(tokens / "tokens", split) for split in SPLITS}
    total = sum(pq.read_metadata(path).num_rows for paths in files.values() for path in paths)
    counts: dict[str, int | float | str] = {}
    with Progress(f"segment ({cfg.kind})", total, unit="documents") as progress:
        for split, paths in files.items():
            n_documents = n_slots = n_segments = n_shared = 0
            for path in paths:
                found: list[Segments] = []
                doc_ids: list[str] = []
                for doc, own, given in _read(documents, path, reference, segmenter):
                    segments = segmenter.segment(doc, given)
                    assert segments.start[0] == 0
                    assert segments.start[-1] < doc.n_slots
                    found.append(segments)
                    doc_ids.append(doc.doc_id)
                    n_slots += doc.n_slots
                    if own is not None:
                        n_shared += len(np.intersect1d(segments.start, own.start)) - 1
                    progress.update()
                n_documents += len(found)
                n_segments += sum(len(one.start) for one in found)
                write_table(out / "segments" / path.name, _table(doc_ids, found), SEGMENTS)
            counts[f"{split}_n_documents"] = n_documents
            counts[f"{split}_n_tokens"] = n_slots - n_documents
            counts[f"{split}_n_segments"] = n_segments
            counts[f"{split}_mean_length"] = round(n_slots / max(n_segments, 1), 4)
            if reference is not None:
                n_cuts = n_segments - n_documents
                counts[f"{split}_shared_cuts"] = round(n_shared / max(n_cuts, 1), 4)
    return counts


def document_slots(tokens: Path, split: str) -> IntArray:
    """Slots of every document of a split, in order: text tokens and the closing one."""
    lengths = [
        chunk.value_lengths().to_numpy()
        for path in shards(tokens / "tokens", split)
        for chunk in read_table(path, TOKENS).column("token_ids").chunks
    ]
    return np.concatenate(lengths).astype(np.int64) + 1


def segment_lengths(stage: Path, slots: IntArray, split: str) -> IntArray:
    """Lengths of all segments in a split of a `segment` stage directory.

    Args:
        slots: slots of every document of the split, in order.
    """
    starts = [
        chunk
        for path in shards(stage / "segments", split)
        for chunk in read_table(path, SEGMENTS).column("segment_start").chunks
    ]
    per_document = np.concatenate([chunk.value_lengths().to_numpy() for chunk in starts])
    start = np.concatenate([chunk.flatten().to_numpy() for chunk in starts]).astype(np.int64)
    # On one line of all documents, a segment ends where the next one starts.
    start += np.repeat(np.cumsum(slots) - slots, per_document)
    return np.diff(start, append=slots.sum())


def _read(
    documents: Path, token_path: Path, reference: Path | None, segmenter: SegmenterLike
) -> Iterator[tuple[Document, Segments | None, Segments | None]]:
    """Documents of a shard, each with its own reference and its donor's."""
    text_path = documents / "documents" / token_path.name
    text, tokens = read_table(text_path, DOCUMENTS), read_table(token_path, TOKENS)
    _same_documents(tokens, token_path, text, text_path)
    byte_start = list(_lists(tokens, "byte_start"))
    own: Sequence[Segments | None] = [None] * len(byte_start)
    if reference is not None:
        path = reference / "segments" / token_path.name
        table = read_table(path, SEGMENTS)
        _same_documents(table, path, text, text_path)
        columns = ("segment_start", "boundary_score", "level")
        parts = zip(*(_lists(table, name) for name in columns), strict=True)
        own = [Segments(*part) for part in parts]
    donors = segmenter.donors(np.array([len(starts) + 1 for starts in byte_start]))
    names = zip(*(text.column(c).to_pylist() for c in ("doc_id", "text", "language")), strict=True)
    for n, (doc_id, content, language) in enumerate(names):
        doc = Document(doc_id, content, language, byte_start[n].astype(np.int64))
        yield doc, own[n], own[donors[n]]


def _same_documents(table: pa.Table, path: Path, text: pa.Table, text_path: Path) -> None:
    if not table.column("doc_id").equals(text.column("doc_id")):
        raise ArtifactError(
            f"{path} ({len(table)} documents) and {text_path} ({len(text)}) hold different "
            "documents; rerun the stage that wrote the older one"
        )


def _lists(table: pa.Table, name: str) -> Iterator[np.ndarray]:
    for chunk in table.column(name).chunks:
        values = chunk.values.to_numpy()
        ends = chunk.offsets.to_numpy()
        for first, end in zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True):
            yield values[first:end]


def _table(doc_ids: list[str], found: list[Segments]) -> pa.Table:
    offsets = pa.array(np.cumsum([0, *(len(one.start) for one in found)]), pa.int32())

    def column(values: list[np.ndarray]) -> pa.ListArray:
        return pa.ListArray.from_arrays(offsets, np.concatenate(values))

    return pa.table(
        {
            "doc_id": doc_ids,
            "segment_start": column([one.start for one in found]),
            "boundary_score": column([one.score for one in found]),
            "level": column([one.level for one in found]),
        }
    )
