"""The journal of a job: append-only JSON lines of metrics and events, the source of every curve.

One line is one record, written by one `os.write` into a file opened for appending: killing the
process at any moment loses at most the line being written, and opening the journal again removes
that torn line. Times are seconds since the epoch, `wall_s` is training seconds so far (it goes on
over resumes), `tokens` are clean tokens so far.

    {"kind": "metrics", "time": 1.7e9, "step": 10, "tokens": 40960, "wall_s": 3.2, "values": {...}}
    {"kind": "event", "time": 1.7e9, "name": "checkpoint", "step": 10}
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import pyarrow as pa

from abf.artifacts import METRICS
from abf.errors import ArtifactError
from abf.files import atomic_path

RESERVED = ("kind", "time", "name")
"""Keys that an event's own fields cannot use."""


class Journal:
    """Append records to one file; a torn last line left by a killed writer is removed first."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._handle = self._open()

    def metrics(self, step: int, tokens: int, values: Mapping[str, float], wall_s: float) -> None:
        """Record the metrics of a step.

        Args:
            step: optimiser steps done.
            tokens: clean tokens consumed so far.
            values: metric name -> finite number.
            wall_s: seconds of training so far.
        """
        assert all(math.isfinite(value) for value in values.values()), dict(values)
        self._append(
            {
                "kind": "metrics",
                "time": time.time(),
                "step": step,
                "tokens": tokens,
                "wall_s": wall_s,
                "values": {name: float(value) for name, value in values.items()},
            }
        )

    def event(self, name: str, **fields: Any) -> None:
        """Record that something happened; `fields` are JSON values."""
        assert not set(fields) & set(RESERVED), fields
        self._append({"kind": "event", "time": time.time(), "name": name, **fields})

    def cut(self, step: int) -> int:
        """Drop the metric records beyond `step`, so that replayed steps never appear twice.

        Events stay: they happened. A cut that drops something is itself recorded as an event.

        Returns:
            number of dropped records.
        """
        lines = self.path.read_bytes().splitlines(keepends=True)
        kept = [
            line
            for number, line in enumerate(lines, start=1)
            if (record := _parse(line, self.path, number))["kind"] != "metrics"
            or record["step"] <= step
        ]
        dropped = len(lines) - len(kept)
        if dropped:
            # A new file under the old name: a kill during the cut leaves the old one whole.
            with atomic_path(self.path) as temporary:
                temporary.write_bytes(b"".join(kept))
            os.close(self._handle)
            self._handle = self._open()
            self.event("cut", step=step, dropped=dropped)
        return dropped

    def sync(self) -> None:
        """Flush to disk; called before a checkpoint stands, so that no crash leaves a hole."""
        os.fsync(self._handle)

    def close(self) -> None:
        """Close the file; the journal takes no more records."""
        os.close(self._handle)

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _open(self) -> int:
        handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        os.ftruncate(handle, _whole_bytes(self.path))
        return handle

    def _append(self, record: Mapping[str, Any]) -> None:
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        line = text.encode() + b"\n"
        before = os.fstat(self._handle).st_size
        try:
            written = os.write(self._handle, line)
            if written < len(line):  # a full disk takes what still fits, then says so
                os.write(self._handle, line[written:])
        except OSError as error:
            os.ftruncate(self._handle, before)
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise ArtifactError(
                    f"disk full while writing {self.path}; free space and run the same command "
                    "again: it goes on from the last checkpoint"
                ) from error
            raise


def read_journal(path: Path) -> list[dict[str, Any]]:
    """Records of a journal in order; a torn last line (its writer was killed) is left out.

    Raises:
        ArtifactError: the file is missing, or another line is no record; names the line.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; the job that writes it has not started") from None
    lines = data[: data.rfind(b"\n") + 1].splitlines(keepends=True)
    return [_parse(line, path, number) for number, line in enumerate(lines, start=1)]


def metrics_table(path: Path) -> pa.Table:
    """The metric records as a tidy table (schema METRICS), one row a step and name."""
    records = [record for record in read_journal(path) if record["kind"] == "metrics"]
    rows = [
        {
            "step": record["step"],
            "tokens": record["tokens"],
            "name": name,
            "value": value,
            "wall_s": record["wall_s"],
        }
        for record in records
        for name, value in record["values"].items()
    ]
    return pa.Table.from_pylist(rows, schema=METRICS)


def _parse(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise ArtifactError(
            f"{path} line {number} is not JSON ({error}); remove that line, or delete the file"
        ) from error
    if not isinstance(record, dict) or record.get("kind") not in ("metrics", "event"):
        raise ArtifactError(
            f"{path} line {number} is no journal record (kind is neither metrics nor event); "
            "remove that line, or delete the file"
        )
    return record


def _whole_bytes(path: Path) -> int:
    """Length of the file up to and with its last newline, reading from the end."""
    with open(path, "rb") as handle:
        end = handle.seek(0, os.SEEK_END)
        while end > 0:
            start = max(0, end - 65536)
            handle.seek(start)
            newline = handle.read(end - start).rfind(b"\n")
            if newline >= 0:
                return start + newline + 1
            end = start
    return 0
