"""Audit of an event log: exact replay, invariants, and steps forwarded anew from the log alone.

Letters: n live slots of a block, V vocabulary, E outputs of the edit head. Differences are of
probabilities, absolute; of missing tokens, relative to one more than was logged.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from abf.data.loader import spread
from abf.decode.events import CLOSING, CODE, from_arrow
from abf.decode.openings import check_earlier
from abf.decode.replay import Folded, fold, group_starts
from abf.decode.reread import Reader, Shot, take_shot
from abf.decode.trace import read_trace
from abf.errors import ArtifactError
from abf.files import sha256
from abf.model.store import WEIGHTS, load_model
from abf.model.transformer import Transformer

TOLERANCE = {"fp32": 1e-3, "bf16": 0.1}
"""Largest difference between a logged number and its re-forward, by the decode's precision: other
batches and kernels round otherwise, an altered number differs by more."""
_NEEDED = ("shift", "clean_stream", "dtype", "decoder", "model_sha256")
_CLOSING = [CODE[name] for name in CLOSING]
_WRITES = [CODE["FILL"], CODE["SUBSTITUTE"]]
_STEP = [*_WRITES, CODE["DELETE"], CODE["INSERT"], CODE["COMMIT"]]


@dataclass(frozen=True)
class Findings:
    """What an audit has seen."""

    complete: bool
    """Every request has its END."""
    requests: int
    tokens: int
    events: Counter[str]
    """By type."""
    checked: int
    """Numbers held against the model."""
    groups: int
    """Steps and writings of keys that were forwarded anew."""
    largest: float
    """Largest difference; 0 if none was looked at."""

    def lines(self, path: Path) -> list[str]:
        """For a person."""
        state = "complete" if self.complete else "incomplete (its tail was cut, or it was killed)"
        kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.events.items()))
        lines = [
            f"{path}: {state}; every event follows the rules and fits the hash chain",
            f"{self.requests} requests, {self.tokens} new tokens; {kinds}",
        ]
        if self.groups:
            lines.append(
                f"{self.checked} numbers of {self.groups} steps forwarded anew: largest "
                f"difference {self.largest:.2g}"
            )
        return lines


def audit(path: Path, *, model_dir: Path | None = None, steps: int = 32) -> Findings:
    """Replay a log, check its invariants and, with a model, some of its steps.

    Args:
        path: `trace.arrows`.
        model_dir: the model that decoded; none leaves the re-forward out.
        steps: how many groups of events are forwarded anew, spread evenly over the log.

    Raises:
        ArtifactError: the log breaks a rule, was altered, or tells of other numbers than the
            model's (names the first bad event); or the model is another one.
    """
    header, table, complete = read_trace(path)
    folded = fold(table, header, where=str(path))
    extent = json.loads(header.get("decoder", "{}")).get("extent")
    if extent and extent["kind"] == "earlier":
        check_earlier(table, folded, back=extent["back"], where=str(path))
    checked = groups = 0
    largest = 0.0
    if model_dir is not None:
        model = _model(model_dir, header, path)
        checked, groups, largest = _reforward(model, header, table, path, steps)
    return Findings(
        complete=complete,
        requests=len(folded),
        tokens=sum(len(state.token_ids) for state in folded.values()),
        events=Counter(table["type"].to_pylist()),
        checked=checked,
        groups=groups,
        largest=largest,
    )


def _model(directory: Path, header: Mapping[str, str], path: Path) -> Transformer:
    if missing := [name for name in _NEEDED if name not in header]:
        raise ArtifactError(f"{path}: its header does not say {', '.join(missing)}")
    if header["dtype"] not in TOLERANCE:
        raise ArtifactError(f"{path}: the header's dtype is {header['dtype']!r}, no precision")
    if not (directory / WEIGHTS).is_file():
        raise ArtifactError(
            f"{directory} holds no {WEIGHTS}: --model takes the folder of the model that decoded, "
            "results/train/KEY/model"
        )
    found = sha256(directory / WEIGHTS)
    if found != header["model_sha256"]:
        raise ArtifactError(
            f"{path} was decoded by a model with sha256 {header['model_sha256'][:12]}…, but "
            f"{directory / WEIGHTS} has {found[:12]}…: give the model that decoded"
        )
    return load_model(directory).eval()


def _reforward(
    model: Transformer, header: Mapping[str, str], table: pa.Table, path: Path, steps: int
) -> tuple[int, int, float]:
    """Numbers compared, groups, largest difference."""
    events = from_arrow(table, str(path))
    starts = np.flatnonzero(group_starts(events))
    stops = np.append(starts[1:], len(events))
    kinds = events["type"][starts]
    deciding = np.isin(kinds, _STEP) & (events["step"][starts] >= 0)
    wanted = np.flatnonzero(deciding | (kinds == CODE["KV_WRITE"]))
    chosen = wanted[list(spread(len(wanted), min(steps, len(wanted))))]
    shots: dict[int, Shot] = {}
    rows = set(starts[chosen].tolist())
    document_id = int(header["document_id"])

    def look(row: int, state: Folded) -> None:
        if row in rows:
            shots[row] = take_shot(state, document_id)

    fold(table, header, where=str(path), look=look)
    reader = Reader(model, header)
    largest, checked = 0.0, 0
    tolerance = TOLERANCE[header["dtype"]]
    for group in chosen.tolist():
        first, stop = starts[group], stops[group]
        part = events[first:stop]
        if part["type"][0] != CODE["KV_WRITE"] and stop < len(events):
            after = events[stop : stop + 1]  # a block that this step has closed
            same = after["request"] == part["request"][0]
            if same & np.isin(after["type"], _CLOSING) & (after["step"] == part["step"][0] + 1):
                part = np.concatenate([part, after])
        logged, found = reader.numbers(part, shots[int(first)])
        told = ~np.isnan(logged)
        differences = np.abs(logged - found)[told] / np.maximum(1, np.abs(logged[told]))
        checked += len(differences)
        if not len(differences):
            continue
        largest = max(largest, float(differences.max()))
        if not differences.max() <= tolerance:  # NaN of the model is a difference too
            bad = part[np.flatnonzero(told)[differences.argmax()] % len(part)]
            raise ArtifactError(
                f"{path}: first bad event is in request {bad['request']}, block {bad['block']}, "
                f"step {bad['step']} (seq {bad['seq']}): its numbers differ by "
                f"{differences.max():.3g} from what the model says (allowed: {tolerance})"
            )
    return checked, len(chosen), largest
