"""Checked readers: files to (record id, text) pairs, with the file and the offset in every error.

Offsets are bytes from the start of the file, counted from 0; lines and rows are counted from 1.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeAlias

import pyarrow as pa
import pyarrow.parquet as pq

from abf.errors import DataError

Record: TypeAlias = tuple[str, str]
"""(id of the record in its source, text)."""

BYTE_ORDER_MARK = "\ufeff"


def decode(data: bytes, where: str, *, base: int = 0) -> str:
    """UTF-8 text of `data`, which starts at byte `base` of `where`; a byte order mark is dropped.

    Raises:
        DataError: not UTF-8; names the place and the offset.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where} is not UTF-8: byte 0x{data[error.start]:02x} at offset "
            f"{base + error.start} ({error.reason}); convert it with "
            "`iconv -f <its encoding> -t utf-8`"
        ) from None
    return text.removeprefix(BYTE_ORDER_MARK) if base == 0 else text


def text_record(path: Path) -> Record:
    """The whole file as one document."""
    return path.name, decode(path.read_bytes(), str(path))


def jsonl_records(path: Path, field: str) -> Iterator[Record]:
    """A record a line; empty lines are passed over.

    Raises:
        DataError: a line that is not UTF-8, not a JSON object, or lacks a string in `field`.
    """
    offset = 0
    with open(path, "rb") as handle:
        for number, line in enumerate(handle, start=1):
            where = f"{path}:{number}"
            text = decode(line, where, base=offset)
            offset += len(line)
            if text.strip():
                yield f"{path.name}:{number}", text_of(_json(text.rstrip(), where), field, where)


def mapping_records(path: Path, field: str) -> Iterator[Record]:
    """One JSON object, id -> record, in the order of the file."""
    mapping = _json(decode(path.read_bytes(), str(path)), str(path))
    if not isinstance(mapping, dict):
        raise DataError(
            f"{path} holds a JSON {type(mapping).__name__}, not an object of id -> record; "
            "set `layout: jsonl` if it has a record a line"
        )
    for name, record in mapping.items():
        yield name, text_of(record, field, f"{path}, record {name!r}")


def _json(text: str, where: str) -> object:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f", line {error.lineno}" if error.lineno > 1 else ""
        raise DataError(
            f"{where} is not valid JSON: {error.msg} at column {error.colno}{line}"
        ) from None
    except RecursionError:
        raise DataError(f"{where} is not usable JSON: nested too deeply") from None


def text_of(record: object, field: str, where: str) -> str:
    """The string in `record[field]`.

    Raises:
        DataError: no object, no such field (names those there are), no string, or a string that
            UTF-8 cannot hold.
    """
    if not isinstance(record, dict):
        raise DataError(f"{where} holds a {type(record).__name__}, not a JSON object with fields")
    if field not in record:
        names = ", ".join(sorted(map(str, record))) or "none"
        raise DataError(f"{where} has no field {field!r}; available: {names} (set text_field)")
    text = record[field]
    if not isinstance(text, str):
        raise DataError(f"{where}: field {field!r} is {type(text).__name__} {text!r:.60}, not text")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: field {field!r} holds a lone surrogate "
            f"U+{ord(text[error.start]):04X} at character {error.start}, which is no text"
        ) from None
    return text


def parquet_records(path: Path, field: str) -> Iterator[Record]:
    """A record a row of a Parquet file.

    Raises:
        DataError: unreadable, no such column (names those there are), not text, or not UTF-8.
    """
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise DataError(f"{path} cannot be read as Parquet: {str(error).splitlines()[0]}") from None
    with file:
        check_text_column(file.schema_arrow, field, str(path))
        row = 1
        for batch in file.iter_batches(columns=[field]):
            column = batch.column(0)
            for index, text in enumerate(column_texts(column, lambda i: f"{path}, row {i}", row)):
                yield f"{path.name}:{row + index}", text
            row += len(column)


def check_text_column(schema: pa.Schema, field: str, where: str) -> None:
    """Raise DataError unless `schema` has a text column named `field`."""
    if field not in schema.names:
        raise DataError(
            f"{where} has no column {field!r}; available: {', '.join(schema.names)} "
            "(set text_field)"
        )
    kind = schema.field(field).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind)):
        raise DataError(f"{where}: column {field!r} is {kind}, not text")


def column_texts(column: pa.Array, where: Callable[[int], str], first: int) -> list[str]:
    """Strings of an Arrow column, whose bytes Arrow itself does not check.

    Args:
        where: names the place of a row, given its number.
        first: number of the column's first row.
    """
    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if column.null_count:
        row = column.is_null().index(True).as_py()
        raise DataError(f"{where(first + row)}: the text is null; drop the row or fill it")
    try:
        return column.to_pylist()
    except UnicodeDecodeError:
        raw = column.cast(pa.large_binary()).to_pylist()
        return [decode(value, where(first + i)) for i, value in enumerate(raw)]
