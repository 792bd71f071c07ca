"""Block lengths of a packed split; letters: R rows, L row length."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from abf.errors import ArtifactError

MAX_ROWS = 20_000
"""Rows that are read of a split; a histogram needs no more."""


def block_lengths(block_id: NDArray[np.int32], document_id: NDArray[np.int32]) -> NDArray[np.int64]:
    """[blocks] tokens in each block; padding and the document token in front are left out.

    Args:
        block_id: [R, L], -1 on padding.
        document_id: [R, L], number of the piece, -1 on padding.
    """
    first = np.ones(block_id.shape, dtype=bool)
    first[:, 1:] = (block_id[:, 1:] != block_id[:, :-1]) | (
        document_id[:, 1:] != document_id[:, :-1]
    )
    context = np.ones(block_id.shape, dtype=bool)
    context[:, 1:] = document_id[:, 1:] != document_id[:, :-1]
    starts = np.flatnonzero(first)
    lengths = np.diff(np.append(starts, block_id.size))
    keep = (block_id.ravel()[starts] >= 0) & ~context.ravel()[starts]
    return lengths[keep]


def read_block_lengths(path: Path) -> NDArray[np.int64]:
    """Block lengths of a packed Arrow file (its first MAX_ROWS rows).

    Raises:
        ArtifactError: the file is missing or no packed file.
    """
    try:
        with pa.memory_map(str(path)) as source:
            reader = pa.ipc.open_file(source)
            found, rows = [], 0
            for index in range(reader.num_record_batches):
                batch = reader.get_batch(index).slice(0, MAX_ROWS - rows)
                found.append(
                    block_lengths(_column(batch, "block_id"), _column(batch, "document_id"))
                )
                rows += batch.num_rows
                if rows >= MAX_ROWS:
                    break
    except (OSError, pa.ArrowInvalid, KeyError) as error:
        raise ArtifactError(
            f"{path} is no packed split ({str(error).splitlines()[0]}); rerun the stage `pack`"
        ) from error
    return np.concatenate(found) if found else np.zeros(0, dtype=np.int64)


def _column(batch: pa.RecordBatch, name: str) -> NDArray[np.int32]:
    column = batch.column(name)
    return column.flatten().to_numpy().reshape(batch.num_rows, -1)
