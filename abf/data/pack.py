"""Tokens and segments to fixed rows: pieces of documents, first-fit, with block numbers.

Slots (see slots.py) are cut into pieces at multiples of L - 1 whatever the segments are, and each
piece gets a document token in front as context: a block of its own, never predicted. Rows are thus
the same for every segmenter; only block_id differs. Padding at the end of a row has the document
token as its id and -1 as block_id and document_id. Letters: L row length, S longest block, N rows.
"""

from __future__ import annotations

import os
import tempfile
from heapq import heappop, heappush
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from abf.artifacts import PIECES, TOKENS, packed_schema, read_table, shards, write_table
from abf.blocks import block_lengths, cut_lengths
from abf.data.config import PackConfig
from abf.data.prepare import SPLITS
from abf.data.slots import Shard, flat_lists, read_slots
from abf.data.tokenizer import TextTokenizer, load_tokenizer
from abf.files import atomic_path
from abf.track.progress import Progress

IntArray = npt.NDArray[np.int64]


def pack(
    cfg: PackConfig, tokens: Path, segments: Path, tokenizer: Path, out: Path
) -> dict[str, int | float | str]:
    """Write `out`/packed/{split}.arrow and {split}.pieces.parquet.

    In the table of pieces, n_blocks does not count the document token in front.

    Args:
        tokens, segments, tokenizer: stage directories of those stages.

    Returns:
        Split by split: rows, pieces, slots to predict, blocks and their mean length, padding,
        documents longer than a row, the cuts that costs, and segments longer than S.

    Raises:
        ArtifactError: the inputs do not belong together; names file, document and value.
    """
    encoder = load_tokenizer(tokenizer / "tokenizer")
    counts: dict[str, int | float | str] = {}
    files = {split: shards(tokens / "tokens", split) for split in SPLITS}
    with Progress("pack", sum(map(len, files.values())), unit="shards") as progress:
        for split, paths in files.items():
            packer = _Packer(cfg, encoder, np.concatenate([_slot_counts(path) for path in paths]))
            with (
                atomic_path(out / "packed" / f"{split}.arrow") as target,
                tempfile.TemporaryDirectory(dir=target.parent, prefix=".rows-") as scratch,
            ):
                packer.open(Path(scratch))
                for shard in read_slots(paths, segments / "segments", encoder):
                    packer.add(shard)
                    progress.update()
                packer.write(target)
            write_table(out / "packed" / f"{split}.pieces.parquet", packer.pieces(), PIECES)
            counts |= {f"{split}_{name}": value for name, value in packer.counts().items()}
    return counts


def first_fit(lengths: npt.ArrayLike, row_length: int) -> tuple[IntArray, IntArray, int]:
    """Put pieces, in order, into the first row that has room; where none has, open a row.

    Args:
        lengths: int [P], each in [1, row_length].

    Returns:
        row [P], column [P] where each piece starts, and the number of rows.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    assert not sizes.size or (sizes.min() >= 1 and sizes.max() <= row_length)
    rows, columns = np.empty(len(sizes), np.int64), np.empty(len(sizes), np.int64)
    none = np.iinfo(np.int64).max
    waiting: list[list[int]] = [[] for _ in range(row_length + 1)]  # heaps of rows, by free tokens
    first = np.full(row_length + 1, none)  # the lowest row of each heap
    n_rows = 0
    for piece, size in enumerate(sizes.tolist()):
        free = size + int(first[size:].argmin())
        row = int(first[free])
        if row == none:
            row, free, n_rows = n_rows, row_length, n_rows + 1
        else:
            heappop(waiting[free])
            first[free] = waiting[free][0] if waiting[free] else none
        rows[piece], columns[piece] = row, row_length - free
        left = free - size
        if left:
            heappush(waiting[left], row)
            first[left] = waiting[left][0]
    return rows, columns, n_rows


class _Packer:
    """One split. Where every piece goes is known from the lengths alone; then shards are poured in.

    Rows are filled on disk (memory-mapped), so that memory holds one shard, not the split.
    """

    def __init__(self, cfg: PackConfig, tokenizer: TextTokenizer, slots: IntArray) -> None:
        self.cfg, self.tokenizer, self.slots = cfg, tokenizer, slots
        room = cfg.row_length - 1
        self.parts = -(-slots // room)
        self.document = np.repeat(np.arange(len(slots)), self.parts)
        ends = np.cumsum(self.parts)
        self.part = np.arange(len(self.document)) - np.repeat(ends - self.parts, self.parts)
        self.lengths = np.minimum(slots[self.document] - self.part * room, room)
        self.row, self.column, self.n_rows = first_fit(self.lengths + 1, cfg.row_length)
        self.n_blocks = np.zeros(len(self.document), np.int64)
        self.n_bytes = np.zeros(len(self.document), np.int64)
        self.doc_ids: list[str] = []
        self.n_capped = 0
        self._blocks_in_row = np.zeros(self.n_rows, np.int64)
        self._next_piece = 0

    def open(self, scratch: Path) -> None:
        """Make the empty rows."""
        size = self.n_rows * self.cfg.row_length
        self._token_ids = _on_disk(scratch / "token_ids", np.uint32, size)
        self._block_id = _on_disk(scratch / "block_id", np.int32, size)
        self._document_id = _on_disk(scratch / "document_id", np.int32, size)
        self._token_ids[:] = self.tokenizer.document_id
        self._block_id[:] = -1
        self._document_id[:] = -1

    def add(self, shard: Shard) -> None:
        """Pour in the next shard."""
        first_document = len(self.doc_ids)
        documents = slice(first_document, first_document + len(shard.doc_ids))
        assert np.array_equal(self.slots[documents], shard.n_slots)
        first = self._next_piece
        pieces = slice(first, first + int(self.parts[documents].sum()))
        lengths, row = self.lengths[pieces], self.row[pieces]
        ends = np.cumsum(lengths)
        starts = ends - lengths

        segment = cut_lengths(shard.segment_start, starts, len(shard.token_ids))
        block = block_lengths(segment, self.cfg.max_block)
        first_block = np.searchsorted(np.cumsum(block) - block, starts)
        n_blocks = np.diff(first_block, append=len(block))
        front = self._claim_blocks(row, n_blocks + 1)
        block_id = np.arange(len(block)) + np.repeat(front + 1 - first_block, n_blocks)

        place = row * self.cfg.row_length + self.column[pieces]
        number = np.arange(pieces.start, pieces.stop)
        self._block_id[place] = front
        self._document_id[place] = number
        target = np.repeat(place + 1 - starts, lengths) + np.arange(len(shard.token_ids))
        self._token_ids[target] = shard.token_ids
        self._block_id[target] = np.repeat(block_id, block)
        self._document_id[target] = np.repeat(number, lengths)

        is_last = self.part[pieces] == self.parts[self.document[pieces]] - 1
        # The closing slot, which ends a last part, starts where the text ends.
        end_slot = np.where(is_last, ends - 1, np.minimum(ends, len(shard.token_ids) - 1))
        self.n_bytes[pieces] = shard.byte_start[end_slot] - shard.byte_start[starts]
        self.n_blocks[pieces] = n_blocks
        self.n_capped += int((segment > self.cfg.max_block).sum())
        self.doc_ids += shard.doc_ids
        self._next_piece = pieces.stop

    def _claim_blocks(self, row: IntArray, count: IntArray) -> IntArray:
        """First block number of each piece in its row, the pieces taken in order."""
        order = np.argsort(row, kind="stable")
        ends = np.cumsum(count[order])
        before = ends - count[order]
        opens = np.ones(len(order), dtype=bool)
        opens[1:] = row[order][1:] != row[order][:-1]
        before -= np.repeat(before[opens], np.diff(np.flatnonzero(opens), append=len(order)))
        claimed = np.empty(len(order), np.int64)
        claimed[order] = before
        claimed += self._blocks_in_row[row]
        np.add.at(self._blocks_in_row, row, count)
        return claimed

    def write(self, path: Path) -> None:
        """Write the rows as an Arrow IPC file of one record batch."""
        assert self._next_piece == len(self.document)
        schema = packed_schema(
            self.cfg.row_length,
            {
                "row_length": str(self.cfg.row_length),
                "max_block": str(self.cfg.max_block),
                "vocab_size": str(self.tokenizer.vocab_size),
                "document_id": str(self.tokenizer.document_id),
            },
        )
        flat = (self._token_ids, self._block_id, self._document_id)
        columns = [
            pa.FixedSizeListArray.from_arrays(pa.array(values), type=field.type)
            for values, field in zip(flat, schema, strict=True)
        ]
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
            writer.write_batch(pa.record_batch(columns, schema=schema))

    def pieces(self) -> pa.Table:
        """The PIECES table."""
        return pa.table(
            {
                "document_id": np.arange(len(self.document)),
                "doc_id": pa.array(self.doc_ids, pa.string()).take(pa.array(self.document)),
                "part": self.part,
                "row": self.row,
                "start": self.column,
                "n_tokens": self.lengths + 1,
                "n_bytes": self.n_bytes,
                "n_blocks": self.n_blocks,
            }
        )

    def counts(self) -> dict[str, int | float | str]:
        """What the manifest says about the split."""
        n_slots, n_blocks = int(self.slots.sum()), int(self.n_blocks.sum())
        padding = 1 - (n_slots + len(self.document)) / (self.n_rows * self.cfg.row_length)
        return {
            "rows": self.n_rows,
            "pieces": len(self.document),
            "slots": n_slots,
            "blocks": n_blocks,
            "mean_block": round(n_slots / n_blocks, 4),
            "padding_fraction": round(padding, 6),
            "long_documents": int((self.parts > 1).sum()),
            "extra_cuts": int((self.parts - 1).sum()),
            "capped_segments": self.n_capped,
        }


def _slot_counts(path: Path) -> IntArray:
    """Slots of each document of a tokens file: its text tokens and the closing one."""
    return flat_lists(read_table(path, TOKENS), "token_ids")[1] + 1


def _on_disk(path: Path, kind: npt.DTypeLike, size: int) -> np.ndarray:
    """A writable array backed by a file whose space is reserved, so a full disk is an error here
    and not a crash at some later store."""
    with open(path, "wb") as handle:
        os.posix_fallocate(handle.fileno(), 0, size * np.dtype(kind).itemsize)
    return np.asarray(np.memmap(path, dtype=kind, mode="r+", shape=(size,)))
