"""Packed rows, memory-mapped, and which rows a step reads, as a pure function of the step.

Letters: B batch rows, L row length, N rows of the file.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from abf.artifacts import check_schema, packed_schema
from abf.errors import ArtifactError

IntArray = npt.NDArray[np.int64]

_METADATA = ("row_length", "max_block", "vocab_size", "document_id")


@dataclass(frozen=True, eq=False)
class PackedBatch:
    """Rows of a packed file (see `abf.artifacts.packed_schema`)."""

    token_ids: IntArray
    """[B, L]; the document token on padding."""
    block_id: IntArray
    """[B, L]; grows along a row, -1 on padding."""
    document_id: IntArray
    """[B, L]; number of the piece in the split, -1 on padding."""
    row: IntArray
    """[B] numbers of the rows in the file."""
    granularity: IntArray | None = None
    """[B, L]; which of its granularities the model is told of the piece, -1 for none; None tells
    nothing at all, as a file does."""
    dropped: npt.NDArray[np.bool_] | None = None
    """[B, L], one value a block: which blocks see nothing of what lies before them but `sinks`;
    None: all see it."""
    sinks: int = 0
    """First tokens of a piece, its document token counted, that dropped blocks go on seeing."""

    def take(self, index: slice | list[int]) -> PackedBatch:
        """Some of the rows."""
        told, dropped = self.granularity, self.dropped
        return PackedBatch(
            self.token_ids[index],
            self.block_id[index],
            self.document_id[index],
            self.row[index],
            None if told is None else told[index],
            None if dropped is None else dropped[index],
            self.sinks,
        )


class PackedRows:
    """A packed file; opening it reads the schema only, rows come from the page cache.

    Raises:
        ArtifactError: the file is missing, truncated, or of another schema; names it.
    """

    def __init__(self, path: Path) -> None:
        try:
            reader = pa.ipc.open_file(pa.memory_map(str(path)))
            metadata = {k.decode(): v.decode() for k, v in (reader.schema.metadata or {}).items()}
            batches = [reader.get_batch(i) for i in range(reader.num_record_batches)]
        except FileNotFoundError:
            raise ArtifactError(f"{path} is missing; rerun pack") from None
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(
                f"{path} cannot be read ({str(error).splitlines()[0]}); it is truncated or no "
                "Arrow file: delete its stage directory and run the same command again"
            ) from error
        absent = [name for name in _METADATA if not metadata.get(name, "").isdigit()]
        if absent:
            raise ArtifactError(f"{path} does not say its {', '.join(absent)}; rerun pack")
        self.row_length = int(metadata["row_length"])
        self.max_block = int(metadata["max_block"])
        self.vocab_size = int(metadata["vocab_size"])
        self.document_token = int(metadata["document_id"])
        check_schema(reader.schema, packed_schema(self.row_length, {}), path)
        if len(batches) != 1 or not batches[0].num_rows:
            raise ArtifactError(f"{path} holds {len(batches)} record batches, not 1 with rows")
        shape = (batches[0].num_rows, self.row_length)
        self._token_ids, self._block_id, self._document_id = (
            column.flatten().to_numpy(zero_copy_only=True).reshape(shape)
            for column in batches[0].columns
        )

    def __len__(self) -> int:
        return len(self._token_ids)

    def rows(self, index: npt.ArrayLike) -> PackedBatch:
        """Copy rows out.

        Args:
            index: int [B] row numbers in [0, N).
        """
        row = np.asarray(index, dtype=np.int64)
        assert row.ndim == 1
        assert not row.size or (row.min() >= 0 and row.max() < len(self))
        return PackedBatch(
            self._token_ids[row].astype(np.int64),
            self._block_id[row].astype(np.int64),
            self._document_id[row].astype(np.int64),
            row,
        )


def row_indices(step: int, *, batch_rows: int, n_rows: int, seed: int) -> tuple[IntArray, IntArray]:
    """Rows that training step `step` reads; needs no state, so a resume cannot lose its place.

    Epoch e visits every row once, in an order drawn from (seed, e); a batch may span two epochs.

    Args:
        step: from 0.

    Returns:
        rows int64 [batch_rows] and the epoch of each, int64 [batch_rows].
    """
    position = step * batch_rows + np.arange(batch_rows, dtype=np.int64)
    epochs = position // n_rows
    rows = np.empty(batch_rows, np.int64)
    for epoch in np.unique(epochs):
        chosen = epochs == epoch
        rows[chosen] = _order(seed, int(epoch), n_rows)[position[chosen] % n_rows]
    return rows, epochs


def spread(total: int, count: int) -> IntArray:
    """`count` numbers in [0, total), rising and evenly spread; all of them if count is total."""
    assert 0 <= count <= total
    return np.arange(count, dtype=np.int64) * total // max(count, 1)


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n_rows: int) -> IntArray:
    order = np.random.default_rng([seed, epoch]).permutation(n_rows)
    order.flags.writeable = False
    return order
