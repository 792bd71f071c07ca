"""Two ways of writing points and tags of a run: into MLflow's sqlite file, or through its client.

`log_batch` costs about 90 microseconds a point in Python objects and commits points before tags. A
sqlite store is therefore written with plain SQL: 30 times faster, and points and tags in one
transaction, so that a killed ingest leaves no point without its journal offset.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from abf.errors import ArtifactError
from abf.track.mlflow_points import Point

CLIENT_POINTS = 900
"""Points a `log_batch` request; MLflow takes 1,000 entities, tags included."""
CLIENT_TAGS = 90
LARGEST = 1.7976931348623157e308
"""MLflow stores infinity as the largest float."""

COLUMNS = {
    "metrics": {"key", "value", "timestamp", "run_uuid", "step", "is_nan"},
    "latest_metrics": {"key", "value", "timestamp", "step", "is_nan", "run_uuid"},
    "tags": {"key", "value", "run_uuid"},
}
"""Tables of MLflow 3 that are written directly."""


_ANEW = "move the file away"
REMEDIES = {
    sqlite3.SQLITE_FULL: "free space on its disk",
    sqlite3.SQLITE_IOERR: "free space on its disk, or have the disk looked at",
    sqlite3.SQLITE_READONLY: "make the file and its folder writable for you",
    sqlite3.SQLITE_PERM: "make the file and its folder writable for you",
    sqlite3.SQLITE_CANTOPEN: "make its folder writable for you",
    sqlite3.SQLITE_BUSY: "end whatever else writes to it",
    sqlite3.SQLITE_CORRUPT: _ANEW,
    sqlite3.SQLITE_NOTADB: _ANEW,
}
"""What a user can do about sqlite's error codes; every other code is a fault of ours."""


class Writer(Protocol):
    """Adds points and sets tags of a run."""

    atomic: bool
    """Whether points and tags of one call stand or fall together."""

    def write(self, run_id: str, points: Sequence[Point], tags: Mapping[str, str]) -> None:
        """Add points and set tags; a point that is already there is left alone."""
        ...

    def settle(self, run_id: str, group: str, points: Sequence[Point]) -> None:
        """Make these the values of the metrics below `group`; nothing is written if they are."""
        ...

    def close(self) -> None:
        """Release what the writer holds."""
        ...


class SqliteWriter:
    """Writes MLflow's tables directly. Units as MLflow's: milliseconds, NaN as (0, is_nan)."""

    atomic = True

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, timeout=60, isolation_level=None)
        for table, expected in COLUMNS.items():
            found = {row[1] for row in self._connection.execute(f"PRAGMA table_info({table})")}
            if found != expected:
                raise ArtifactError(
                    f"{path}: table {table} has the columns {sorted(found)}, expected "
                    f"{sorted(expected)}; another MLflow wrote it. Use the MLflow of envs/, or "
                    "move the file away: it is filled again from the journals"
                )

    def write(self, run_id: str, points: Sequence[Point], tags: Mapping[str, str]) -> None:
        """Add points and set tags in one transaction."""
        with self._transaction():
            self._add(run_id, points)
            self._connection.executemany(
                "INSERT INTO tags (run_uuid, key, value) VALUES (?, ?, ?)"
                " ON CONFLICT (run_uuid, key) DO UPDATE SET value = excluded.value",
                [(run_id, key, value) for key, value in tags.items()],
            )

    def settle(self, run_id: str, group: str, points: Sequence[Point]) -> None:
        """Replace the metrics whose names begin with `group`, history included."""
        of_group = "WHERE run_uuid = ? AND substr(key, 1, ?) = ?"
        which = (run_id, len(group), group)
        have = self._connection.execute(
            f"SELECT run_uuid, key, value, timestamp, step, is_nan FROM metrics {of_group}", which
        )
        if sorted(have) == sorted(_row(run_id, point) for point in points):
            return
        with self._transaction():
            for table in ("metrics", "latest_metrics"):
                self._connection.execute(f"DELETE FROM {table} {of_group}", which)
            self._add(run_id, points)

    def _add(self, run_id: str, points: Sequence[Point]) -> None:
        rows = [_row(run_id, point) for point in points]
        latest: dict[str, tuple[Any, ...]] = {}
        for row in rows:
            known = latest.get(row[1])
            if known is None or _rank(row) > _rank(known):
                latest[row[1]] = row
        self._connection.executemany(
            "INSERT OR IGNORE INTO metrics (run_uuid, key, value, timestamp, step, is_nan)"
            " VALUES (?, ?, ?, ?, ?, ?)",
            rows,
        )
        # MLflow's rule: the latest value is the one with the largest (step, time, value).
        self._connection.executemany(
            "INSERT INTO latest_metrics (run_uuid, key, value, timestamp, step, is_nan)"
            " VALUES (?, ?, ?, ?, ?, ?)"
            " ON CONFLICT (run_uuid, key) DO UPDATE SET value = excluded.value,"
            " timestamp = excluded.timestamp, step = excluded.step, is_nan = excluded.is_nan"
            " WHERE (excluded.step, excluded.timestamp, excluded.value)"
            " > (latest_metrics.step, latest_metrics.timestamp, latest_metrics.value)",
            latest.values(),
        )

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        self._connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # a full disk has ended it already
                self._connection.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Close the connection."""
        self._connection.close()


def _row(run_id: str, point: Point) -> tuple[Any, ...]:
    value, is_nan = point.value, math.isnan(point.value)
    if is_nan:
        value = 0.0
    elif math.isinf(value):
        value = math.copysign(LARGEST, value)
    return run_id, point.key, value, point.timestamp, point.step, is_nan


def _rank(row: tuple[Any, ...]) -> tuple[Any, ...]:
    return row[4], row[3], row[2]


class ClientWriter:
    """Writes through `MlflowClient.log_batch`, for a tracking server or another database."""

    atomic = False

    def __init__(self, client: Any) -> None:
        self._client = client

    def write(self, run_id: str, points: Sequence[Point], tags: Mapping[str, str]) -> None:
        """Add points, then set tags; the tags travel with the last batch of points."""
        from mlflow.entities import Metric, RunTag

        *first, last = _chunks(points, CLIENT_POINTS)
        head, *rest = _chunks([RunTag(key, value) for key, value in tags.items()], CLIENT_TAGS)
        for chunk in first:
            self._client.log_batch(run_id, metrics=[Metric(*point) for point in chunk])
        for chunk in rest:
            self._client.log_batch(run_id, tags=chunk)
        self._client.log_batch(run_id, metrics=[Metric(*point) for point in last], tags=head)

    def settle(self, run_id: str, group: str, points: Sequence[Point]) -> None:
        """Let what differs follow as a next step: a tracking server lets nobody remove a value."""
        current = self._client.get_run(run_id).data.metrics
        changed = [point for point in points if current.get(point.key) != point.value]
        steps = {
            point.key: max(m.step for m in self._client.get_metric_history(run_id, point.key)) + 1
            for point in changed
            if point.key in current
        }
        if changed:
            self.write(run_id, [p._replace(step=steps.get(p.key, p.step)) for p in changed], {})

    def close(self) -> None:
        """Nothing is held."""


def _chunks(items: Iterable[Any], size: int) -> list[list[Any]]:
    """Lists of at most `size`; one empty list for no items."""
    items = list(items)
    return [items[i : i + size] for i in range(0, len(items), size)] or [[]]


@contextlib.contextmanager
def store_faults(tracking_uri: str) -> Iterator[None]:
    """Say what is wrong with the sqlite file, however deep MLflow and SQLAlchemy have wrapped it.

    Raises:
        ArtifactError: the file cannot be written or read; says what to do.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, sqlite3.Error):
            cause = cause.__cause__ or cause.__context__
        # Extended codes have the plain one in their lowest byte.
        code = getattr(cause, "sqlite_errorcode", 0) & 0xFF
        if code not in REMEDIES:
            raise
        raise ArtifactError(
            f"MLflow's store {sqlite_path(tracking_uri)}: {cause}; {REMEDIES[code]}, and run the "
            "same command again: it fills in what is missing from the journals"
        ) from error


def sqlite_path(tracking_uri: str) -> Path | None:
    """File of a `sqlite:///...` URI; None for any other URI."""
    prefix = "sqlite:///"
    return Path(tracking_uri.removeprefix(prefix)) if tracking_uri.startswith(prefix) else None
