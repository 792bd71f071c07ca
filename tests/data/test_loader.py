"""Rows from disk, and the order in which training reads them."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abf.artifacts import packed_schema
from abf.data.loader import PackedRows, row_indices
from abf.errors import ArtifactError

METADATA = {"row_length": "4", "max_block": "2", "vocab_size": "600", "document_id": "0"}
CONTENT = np.arange(28).reshape(7, 4)


def write(path: Path, metadata: dict[str, str] = METADATA, *, n_batches: int = 1) -> Path:
    schema = packed_schema(4, metadata)
    columns = [
        pa.FixedSizeListArray.from_arrays(
            pa.array((CONTENT.ravel() + shift).astype(kind)), type=field.type
        )
        for field, shift, kind in zip(schema, (0, 100, 200), ("u4", "i4", "i4"), strict=True)
    ]
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for _ in range(n_batches):
            writer.write_batch(pa.record_batch(columns, schema=schema))
    return path


def test_rows_are_copied_in_the_order_asked_for(tmp_path: Path) -> None:
    rows = PackedRows(write(tmp_path / "a.arrow"))
    assert len(rows) == 7
    batch = rows.rows([5, 0, 5])
    np.testing.assert_array_equal(batch.token_ids, CONTENT[[5, 0, 5]])
    np.testing.assert_array_equal(batch.block_id, CONTENT[[5, 0, 5]] + 100)
    np.testing.assert_array_equal(batch.document_id, CONTENT[[5, 0, 5]] + 200)
    assert batch.row.tolist() == [5, 0, 5]
    for array in (batch.token_ids, batch.block_id, batch.document_id, batch.row):
        assert array.dtype == np.int64
        assert array.flags.writeable


@pytest.mark.parametrize("bad", [[7], [-1]])
def test_rows_outside_the_file(tmp_path: Path, bad: list[int]) -> None:
    with pytest.raises(AssertionError):
        PackedRows(write(tmp_path / "a.arrow")).rows(bad)


@pytest.mark.parametrize("share", [0, 0.3, 0.99])
def test_truncated_file_is_named(tmp_path: Path, share: float) -> None:
    path = write(tmp_path / "a.arrow")
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ArtifactError, match=r"a\.arrow cannot be read"):
        PackedRows(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.arrow"
    with pytest.raises(ArtifactError, match=r"a\.arrow is missing"):
        PackedRows(path)
    write(path, {k: v for k, v in METADATA.items() if k != "max_block"})
    with pytest.raises(ArtifactError, match="does not say its max_block"):
        PackedRows(path)
    write(path, {**METADATA, "row_length": "5"})
    with pytest.raises(ArtifactError, match=r"a\.arrow has another schema: block_id: found fixed"):
        PackedRows(path)
    write(path, n_batches=2)
    with pytest.raises(ArtifactError, match="2 record batches"):
        PackedRows(path)
    table = pa.table({"token_ids": [1]}).replace_schema_metadata(METADATA)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ArtifactError, match="block_id: found nothing"):
        PackedRows(path)


@given(
    batch_rows=st.integers(1, 13),
    n_rows=st.integers(1, 40),
    seed=st.integers(0, 5),
    steps=st.integers(1, 30),
)
def test_every_epoch_reads_every_row_once(
    batch_rows: int, n_rows: int, seed: int, steps: int
) -> None:
    parts = [
        row_indices(step, batch_rows=batch_rows, n_rows=n_rows, seed=seed) for step in range(steps)
    ]
    rows = np.concatenate([part[0] for part in parts])
    epochs = np.concatenate([part[1] for part in parts])
    assert epochs.tolist() == [i // n_rows for i in range(len(rows))]
    for epoch in range(len(rows) // n_rows):
        assert sorted(rows[epochs == epoch]) == list(range(n_rows))


def test_order_is_a_function_of_the_step_alone() -> None:
    def ask(step: int, seed: int = 3) -> list[int]:
        return row_indices(step, batch_rows=8, n_rows=100, seed=seed)[0].tolist()

    forwards = [ask(step) for step in range(40)]
    backwards = [ask(step) for step in reversed(range(40))][::-1]
    assert forwards == backwards
    assert ask(0, seed=4) != forwards[0]
    first = list(chain(*forwards[:12]))[:100]
    assert first != sorted(first)
    # Half batches see the same stream: 2 steps of 4 rows are 1 step of 8.
    halves = [row_indices(s, batch_rows=4, n_rows=100, seed=3)[0].tolist() for s in range(80)]
    assert list(chain(*halves)) == list(chain(*forwards))
    # Golden values: a change of the order would make old checkpoints resume on other rows.
    assert row_indices(13, batch_rows=4, n_rows=9, seed=7)[0].tolist() == [0, 6, 4, 5]
