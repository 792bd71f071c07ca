"""The event record of a decode: layout, hash chain, and the way to and from Arrow.

Letters: m events, k = ALTERNATIVES. One request's events, in order of `seq`, are a chain: each
`state_hash` covers the hash before it and every logged field of its own event but the wall clock.
The first event of a group (PHASES) also covers the state it starts from, so a log that does not
tell what the engine did cannot be folded without a mismatch. -1 and NaN stand for "does not apply".
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from abf.artifacts import EVENTS
from abf.decode.sampler import ALTERNATIVES
from abf.errors import ArtifactError

PHASES = {
    "PROMPT": 0,  # a context token: uid, left_uid, new_id; `length` of a block it begins
    "OPEN": 1,  # a block of `length` slots is opened, at step -1; FILLs of that step: with text
    "INSERT": 1,  # a mask behind left_uid: uid, new_id = MASK, gate = tokens missing there, net
    "FILL": 1,  # a mask becomes new_id: prob before temperature, entropy, alternatives, gate = keep
    "COMMIT": 1,  # a slot is locked
    "COMPLETE": 3,  # the block is closed; its first `length` slots are delivered; gate = complete
    "FORCED_COMPLETE": 3,  # the same, before the strategy was done: the step or time cap
    "KV_WRITE": 4,  # a delivered token's keys and values are cached: prob = its AR probability
    "END": 5,  # `length` new tokens in all; new_id = the document token if it closed the text
    "DELETE": 1,  # a slot that held old_id goes: gate = delete
    "SUBSTITUTE": 1,  # a token old_id becomes new_id, as in FILL, gate = revise
    "STALLED_COMPLETE": 3,  # closed, as nothing was left to do and the strategy would not close it
    "REOPEN": 1,  # the closed block's slots are unlocked: prob = mean AR probability (geometric)
}
"""Event types and the group each belongs to; a group is one (block, step, phase) of a request.
Within a step: DELETE, then SUBSTITUTE and FILL from left to right, INSERT from right to left,
COMMIT. `threshold` is the bar that was passed; FORCED_COMPLETE, STALLED_COMPLETE: was not."""

CLOSING = ("COMPLETE", "FORCED_COMPLETE", "STALLED_COMPLETE")
"""Types that close a block."""

TYPES = tuple(PHASES)
CODE = {name: code for code, name in enumerate(TYPES)}
PHASE = np.array(list(PHASES.values()), dtype=np.int32)

_FIELDS: list[tuple[str, str]] = [
    ("request", "<i4"),
    ("block", "<i4"),
    ("step", "<i4"),
    ("nfe", "<i4"),
    ("seq", "<i8"),
    ("type", "<i4"),
    ("uid", "<i4"),
    ("left_uid", "<i4"),
    ("old_id", "<i4"),
    ("new_id", "<i4"),
    ("prob", "<f4"),
    ("gate", "<f4"),
    ("entropy", "<f4"),
    ("threshold", "<f4"),
    ("length", "<i4"),
]
RECORD = np.dtype(
    [*_FIELDS, ("alt_ids", "<i4", (ALTERNATIVES,)), ("alt_probs", "<f4", (ALTERNATIVES,))]
)
"""What is hashed of an event; `type` is an index into TYPES."""

_BLANK = np.zeros(1, dtype=RECORD)
for _name, _kind in _FIELDS:
    _BLANK[_name] = np.nan if _kind == "<f4" else -1
_BLANK["alt_ids"], _BLANK["alt_probs"] = -1, np.nan
_BLANK_BYTES = _BLANK.tobytes()

DIGEST_BYTES = 8


def blank(count: int, kind: str, **columns: Any) -> NDArray[Any]:
    """[m] events of one type with the given fields, everything else "does not apply"."""
    # Ten times as fast as copying records, and this runs for every step of every request.
    events = np.frombuffer(bytearray(_BLANK_BYTES * count), dtype=RECORD)
    events["type"] = CODE[kind]
    for name, value in columns.items():
        events[name] = value
    return events


def state_bytes(closed: int, uids: Any, ids: Any, committed: Any) -> bytes:
    """Canonical bytes of a request's state: tokens behind it, and its active block's slots."""
    slots = np.asarray([uids, ids, committed], dtype="<i4")
    return closed.to_bytes(8, "little") + slots.tobytes()


def root(header: Mapping[str, str]) -> bytes:
    """What every request's chain of hashes begins with: the log's header belongs to what is
    hashed."""
    told = json.dumps(dict(header), sort_keys=True).encode()
    return hashlib.blake2b(told, digest_size=DIGEST_BYTES).digest()


def link(previous: bytes, record: bytes, state: bytes) -> bytes:
    """Next hash of a chain; `state` is empty inside a group."""
    return hashlib.blake2b(previous + state + record, digest_size=DIGEST_BYTES).digest()


def to_arrow(
    events: NDArray[Any], hashes: Sequence[str], wall_s: NDArray[np.float64]
) -> pa.RecordBatch:
    """[m] events as a batch of the EVENTS schema."""
    columns: dict[str, pa.Array] = {
        name: pa.array(np.ascontiguousarray(events[name]))
        for name, _ in _FIELDS
        if name not in ("type",)
    }
    columns["type"] = pa.array(np.array(TYPES, dtype=object)[events["type"]], type=pa.string())
    given = events["alt_ids"] >= 0
    offsets = pa.array(np.concatenate([[0], given.sum(axis=1).cumsum()]).astype(np.int32))
    for name in ("alt_ids", "alt_probs"):
        columns[name] = pa.ListArray.from_arrays(offsets, pa.array(events[name][given]))
    columns["state_hash"] = pa.array(hashes, type=pa.string())
    columns["wall_s"] = pa.array(wall_s)
    return pa.RecordBatch.from_arrays([columns[name] for name in EVENTS.names], schema=EVENTS)


def from_arrow(table: pa.Table, where: str) -> NDArray[Any]:
    """[m] events of a table of the EVENTS schema (hash and wall clock left out).

    Raises:
        ArtifactError: an event of an unknown type, or with too many alternatives.
    """
    events = np.repeat(_BLANK, len(table))
    for name, _ in _FIELDS:
        if name != "type":
            events[name] = table[name].to_numpy()
    codes = np.array([CODE.get(name, -1) for name in table["type"].to_pylist()], dtype=np.int32)
    _refuse(codes < 0, table, where, f"is of an unknown type (known: {', '.join(TYPES)})")
    events["type"] = codes
    for name in ("alt_ids", "alt_probs"):
        lists = table[name].combine_chunks()
        counts = lists.value_lengths().to_numpy()
        _refuse(counts > ALTERNATIVES, table, where, f"has more than {ALTERNATIVES} {name}")
        events[name][np.arange(ALTERNATIVES) < counts[:, None]] = lists.flatten().to_numpy()
    return events


def _refuse(bad: NDArray[np.bool_], table: pa.Table, where: str, reason: str) -> None:
    if bad.any():
        row = table.slice(int(bad.argmax()), 1).to_pylist()[0]
        raise ArtifactError(
            f"{where}: first bad event is request {row['request']}, seq {row['seq']} "
            f"({row['type']}): it {reason}"
        )
