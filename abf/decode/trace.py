"""The event log: an Arrow IPC stream, written as a decode goes and readable however it ended.

A file is a header (schema metadata, strings: `mask_id`, `document_id`, `requests` and whatever says
what ran), then record batches of the EVENTS schema, flushed when a block is closed (blocks of a few
tokens: once they hold FLUSH_TOKENS). Killing a decode loses at most the events since the last
flush; the reader then says "incomplete".
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from abf.artifacts import EVENTS, check_schema
from abf.decode.events import RECORD, link, root, to_arrow
from abf.errors import ArtifactError

HEADER = ("mask_id", "document_id", "requests")
"""Metadata that every log carries."""
FLUSH_TOKENS = 16
"""Tokens of closed blocks that are handed over at once. A flush a token would cost AR decoding,
whose blocks are single tokens, several per cent of its time, and so flatter what it is compared
with."""


class TraceWriter:
    """Append events; hash them; flush at block ends."""

    def __init__(self, path: Path, metadata: Mapping[str, str]) -> None:
        missing = [name for name in HEADER if name not in metadata]
        assert not missing, f"the log's header lacks {missing}"
        self.path = path
        self.rows = 0
        """Events written."""
        self._file = open(path, "wb")  # noqa: SIM115 (closed by close)
        self._stream = pa.ipc.new_stream(self._file, EVENTS.with_metadata(dict(metadata)))
        self._began = time.perf_counter()
        self._root = root(metadata)
        self._chains: dict[int, tuple[int, bytes]] = {}
        self._data: list[bytes] = []
        self._tokens = 0
        self._hashes: list[str] = []
        self._wall: list[float] = []

    def write(self, events: NDArray[Any], state: bytes) -> None:
        """Append one group of one request.

        Args:
            events: [m] RECORDs, all of one (request, block, step, phase); `seq` is set here.
            state: the request's state before them, `state_bytes`.
        """
        request = int(events["request"][0])
        seq, digest = self._chains.get(request, (0, self._root))
        count = len(events)
        events["seq"] = np.arange(seq, seq + count)
        data, size = events.tobytes(), RECORD.itemsize
        for start in range(0, count * size, size):
            digest = link(digest, data[start : start + size], state)
            self._hashes.append(digest.hex())
            state = b""
        self._chains[request] = (seq + count, digest)
        self._data.append(data)
        self._wall.extend([time.perf_counter() - self._began] * count)
        self.rows += count

    def closed(self, tokens: int) -> None:
        """Blocks of so many tokens were closed and written: flush if that is enough."""
        self._tokens += tokens
        if self._tokens >= FLUSH_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Hand what was appended to the operating system."""
        self._tokens = 0
        if not self._data:
            return
        events = np.frombuffer(b"".join(self._data), dtype=RECORD)
        self._stream.write_batch(to_arrow(events, self._hashes, np.array(self._wall)))
        self._file.flush()
        self._data, self._hashes, self._wall = [], [], []

    def close(self) -> None:
        """Flush, end the stream, close the file."""
        self.flush()
        self._stream.close()
        self._file.close()

    def __enter__(self) -> TraceWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        else:
            self._file.close()


def read_trace(path: Path) -> tuple[dict[str, str], pa.Table, bool]:
    """Header, events, and whether the log is complete.

    A log whose tail was cut (a killed decode, a half-copied file) gives every whole batch before
    the cut and complete=False; so does one in which a request has no END.

    Raises:
        ArtifactError: the file is missing, its header cannot be read, it has another schema, or
            it is damaged elsewhere than at its end.
    """
    try:
        source = pa.BufferReader(path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; rerun the stage that writes it") from None
    try:
        stream = pa.ipc.open_stream(source)
        check_schema(stream.schema, EVENTS, path)
        metadata = {k.decode(): v.decode() for k, v in (stream.schema.metadata or {}).items()}
    except (pa.ArrowException, UnicodeDecodeError, OSError) as error:
        raise ArtifactError(
            f"{path} has no readable header ({str(error).splitlines()[0]}); it was cut before its "
            "first event or is no event log: rerun the decode"
        ) from error
    if missing := [name for name in HEADER if name not in metadata]:
        raise ArtifactError(f"{path}: the header lacks {', '.join(missing)}")
    for name in HEADER:
        if not metadata[name].isdecimal():
            raise ArtifactError(f"{path}: the header's {name} is {metadata[name]!r}, no number")
    batches, whole = [], True
    while True:
        try:
            batch = stream.read_next_batch()
        except StopIteration:
            break
        except (pa.ArrowException, OSError) as error:
            if source.tell() < source.size():  # what is there is wrong, not only too little
                raise _damaged(path, batches, error) from error
            whole = False
            break
        try:
            _check_values(batch)
        except pa.ArrowInvalid as error:
            raise _damaged(path, batches, error) from error
        batches.append(batch)
    if behind := source.size() - source.tell():
        raise ArtifactError(f"{path} goes on behind its end: {behind} bytes are no part of the log")
    table = pa.Table.from_batches(batches, schema=stream.schema)
    ends = int(np.count_nonzero(table["type"].to_numpy() == "END"))
    return metadata, table, whole and ends == int(metadata["requests"])


def _check_values(batch: pa.RecordBatch) -> None:
    """Offsets, texts and lengths, on which Arrow relies without looking; no value may be null.

    Raises:
        ArrowInvalid: names the column.
    """
    batch.validate(full=True)
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        values = [column, column.values] if isinstance(column, pa.ListArray) else [column]
        if any(each.null_count for each in values):
            raise pa.ArrowInvalid(f"In column {name}: a value is null")


def _damaged(path: Path, before: list[pa.RecordBatch], error: Exception) -> ArtifactError:
    return ArtifactError(
        f"{path} is damaged or was altered behind its first {sum(map(len, before))} events, in "
        f"batch {len(before)} ({str(error).splitlines()[0]}): rerun the decode"
    )
