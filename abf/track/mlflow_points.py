"""Points for MLflow out of journals and score files; pure functions of files.

Times are MLflow's milliseconds since 1970 UTC and always come from the files, never from the clock
of the ingest: the same files give the same database.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from abf.artifacts import SCORES, read_table
from abf.errors import ArtifactError
from abf.stages import MANIFEST
from abf.track.system import SYSTEM

_NOT_IN_KEYS = re.compile(r"[^\w.\- /]")


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    timestamp: int
    """Milliseconds since 1970 UTC."""
    step: int


class JournalPart(NamedTuple):
    """The part of a journal that is not in the store yet."""

    points: list[Point]
    offset: int
    """Bytes read so far, up to and with the last whole line."""
    tail: str
    """Hash of the last line read: tells an appended journal from one that was cut and rewritten."""
    rescanned: bool
    """True when the file was read from its start although some of it had been read before."""


def journal_stage(path: Path) -> str:
    """Stage of `results/{stage}/{key}/journal.jsonl`: the group of its metrics in the UI.

    The names become `{stage}/{metric}`, for example `train/loss`.
    """
    return path.parent.parent.name


def journal_name(path: Path) -> str:
    """What tells the journals of a run apart: `train`, `train.system`."""
    stage = journal_stage(path)
    return stage if path.stem == "journal" else f"{stage}.{path.stem}"


def read_new_points(path: Path, *, offset: int, tail: str) -> JournalPart:
    """Points behind `offset`, or all of them if the journal no longer holds the line before it.

    Args:
        path: the journal; it may not exist yet.
        offset: bytes ingested before.
        tail: hash of the last line ingested before ("" for none).
    """
    data = path.read_bytes() if path.exists() else b""
    data = data[: data.rfind(b"\n") + 1]
    rescanned = offset > 0 and _tail(data[:offset]) != tail
    begin = 0 if rescanned else offset
    stage = journal_stage(path)
    points: list[Point] = []
    for line in data[begin:].split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ArtifactError(f"{path}: line {line[:80]!r} is not JSON ({error})") from error
        group, values = stage, record.get("values", {})
        if record["kind"] == "metrics":
            values = {"tokens": record["tokens"], **values}
        elif record["name"] == SYSTEM:
            group = SYSTEM
        else:
            continue
        time, step = milliseconds(record["time"]), record["step"]
        for name, value in values.items():
            points.append(Point(clean_key(f"{group}/{name}"), float(value), time, step))
    return JournalPart(points, len(data), _tail(data), rescanned)


def _tail(data: bytes) -> str:
    if not data.endswith(b"\n"):
        return ""
    last = data[data.rfind(b"\n", 0, -1) + 1 :]
    return hashlib.sha256(last).hexdigest()[:16]


def score_points(directory: Path) -> tuple[list[Point], list[str], bytes]:
    """Scores of a score stage directory as metrics `{task}[/{decoder}]/{metric}` at step 0.

    Returns:
        points (ends of intervals are `interval/..._ci_low` and `_ci_high`, a group of their own in
        the UI); names of what was not measured; the scores as CSV. Empty while unfinished.
    """
    path = directory / "scores.parquet"
    if not (directory / MANIFEST).exists() or not path.exists():
        return [], [], b""
    time = milliseconds(path.stat().st_mtime)
    points: list[Point] = []
    missing: list[str] = []
    rows = read_table(path, SCORES).to_pylist()
    for row in rows:
        name = "/".join(part for part in (row["task"], row["decoder"], row["metric"]) if part)
        name = clean_key(name)
        if row["value"] is None:
            missing.append(name)
            continue
        points.append(Point(name, float(row["value"]), time, 0))
        for end in ("ci_low", "ci_high"):
            if row[end] is not None:
                points.append(Point(f"interval/{name}_{end}", float(row[end]), time, 0))
    return points, missing, to_csv(SCORES.names, rows)


def clean_key(name: str) -> str:
    """A name with the characters MLflow refuses replaced by `_`."""
    return _NOT_IN_KEYS.sub("_", name)[:250]


def milliseconds(seconds: float) -> int:
    """Seconds since 1970 as MLflow's integer milliseconds."""
    return round(seconds * 1000)


def to_csv(columns: Iterable[str], rows: Iterable[Mapping[str, Any]]) -> bytes:
    """Rows as CSV (missing values are empty)."""
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(columns), extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()
