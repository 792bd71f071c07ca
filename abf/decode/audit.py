"""Audit of an event log: exact replay, invariants, and steps forwarded anew from the log alone.

Letters: n live slots of a block, V vocabulary, E outputs of the edit head. Differences are of
probabilities, absolute; of missing tokens, relative to one more than was logged.
"""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from abf.data.loader import spread
from abf.decode.events import CLOSING, CODE, from_arrow
from abf.decode.openings import check_earlier
from abf.decode.replay import Folded, fold, group_starts
from abf.decode.trace import read_trace
from abf.diffusion.policy.gates import read_gates
from abf.diffusion.policy.need import one_block
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


@dataclass(frozen=True)
class _Shot:
    """A request before one group of events."""

    context: list[int]
    """Prompt and delivered tokens, without those whose keys the group writes."""
    edges: list[int]
    """[context] row up to which each context row sees, in a block-causal clean stream."""
    uids: list[int]
    block: list[int]
    """Ids: of the open block's slots, or of the tokens whose keys are written."""
    live: int


def _shot(state: Folded, document_id: int) -> _Shot:
    waiting = len(state.unwritten)
    text = [*state.prompt_ids, *state.token_ids]
    context = text[: len(text) - waiting]
    edges = list(range(1, len(state.prompt_ids) + 1))
    for length in state.block_lengths:
        edges += [len(edges) + length] * length
    ends = [
        slot + 1 for slot, (i, held) in enumerate(zip(state.ids, state.locked, strict=True))
        if held and i == document_id
    ]  # fmt: skip
    block = text[len(context) :] if waiting else list(state.ids)
    live = ends[0] if ends else len(block)
    return _Shot(context, edges[: len(context)], list(state.uids), block, live)


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
    shots: dict[int, _Shot] = {}
    rows = set(starts[chosen].tolist())
    document_id = int(header["document_id"])

    def look(row: int, state: Folded) -> None:
        if row in rows:
            shots[row] = _shot(state, document_id)

    fold(table, header, where=str(path), look=look)
    reader = _Reader(model, header)
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


class _Reader:
    """Reads a model as the header says the decode did."""

    def __init__(self, model: Transformer, header: Mapping[str, str]) -> None:
        self.model = model
        decoder = json.loads(header["decoder"])
        self.shift = header["shift"] == "true" or decoder["extent"] is None
        granularity = decoder.get("granularity")
        known = model.config.granularities
        self.told = -1 if granularity is None else known.index(granularity)
        self.block_causal = header["clean_stream"] == "block_causal"
        self.bf16 = header["dtype"] == "bf16"

    def numbers(
        self, events: NDArray[Any], shot: _Shot
    ) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """[x*m] logged numbers of m events, and the model's; NaN where an event has none."""
        if events["type"][0] == CODE["KV_WRITE"]:
            probs, _ = self._read(shot, causal=True)
            found = probs[np.arange(len(events)), shot.block[: len(events)]]
            return events["prob"].astype(np.float64), found
        probs, raw = self._read(shot, causal=False)
        n, m = shot.live, len(events)
        where = {uid: slot for slot, uid in enumerate(shot.uids[:n])}
        slot = np.array([where.get(uid, -1) for uid in events["uid"].tolist()], dtype=np.intp)
        writes = np.isin(events["type"], _WRITES)
        prob = np.full(m, np.nan)
        entropy = np.full(m, np.nan)
        alts = np.full((m, events["alt_ids"].shape[1]), np.nan)
        rows = probs[slot[writes]]
        prob[writes] = rows[np.arange(len(rows)), events["new_id"][writes]]
        with np.errstate(divide="ignore", invalid="ignore"):
            entropy[writes] = -np.nan_to_num(rows * np.log(rows)).sum(axis=1)
        alts[writes] = np.take_along_axis(rows, events["alt_ids"][writes].clip(min=0), axis=1)
        gate = self._gates(events, shot, slot, raw)
        logged = [
            np.where(writes, events["prob"], np.nan), events["entropy"], events["gate"],
            *events["alt_probs"].T,
        ]  # fmt: skip
        return np.concatenate(logged).astype(np.float64), np.concatenate(
            [prob, entropy, gate, *alts.T]
        )

    def _gates(
        self, events: NDArray[Any], shot: _Shot, slot: NDArray[np.intp], raw: torch.Tensor | None
    ) -> NDArray[np.float64]:
        gate = np.full(len(events), np.nan)
        if raw is None:
            return gate
        is_mask = np.array(shot.block[: shot.live]) == self.model.mask_id
        gates = read_gates(raw, torch.from_numpy(is_mask))
        missing = one_block(gates.missing.numpy(), gates.delete.exp().numpy(), is_mask).net()
        by_type = {
            CODE["FILL"]: gates.keep.exp().numpy(),
            CODE["SUBSTITUTE"]: gates.revise.exp().numpy(),
            CODE["DELETE"]: gates.delete.exp().numpy(),
        }
        left = 0  # masks of one gap are told from left to right: the first names what is before it
        fresh: set[int] = set()
        for row, event in enumerate(events):
            kind = int(event["type"])
            if kind in by_type:
                gate[row] = by_type[kind][slot[row]]
            elif kind == CODE["INSERT"]:
                if int(event["left_uid"]) not in fresh:
                    uids = shot.uids[: shot.live]
                    before = int(event["left_uid"])
                    left = uids.index(before) + 1 if before in uids else 0
                fresh.add(int(event["uid"]))
                gate[row] = missing[left]
            elif kind in _CLOSING:
                gate[row] = float(gates.complete.sigmoid())
        return gate

    def _read(
        self, shot: _Shot, *, causal: bool
    ) -> tuple[NDArray[np.float64], torch.Tensor | None]:
        """Token probabilities [n, V] of a block's live slots, and edit numbers [n+1, E]."""
        model, before, n = self.model, len(shot.context), shot.live
        ends = model.config.edit_heads and not causal
        ids = torch.tensor([shot.context + shot.block + [model.end_id] * ends])
        row = torch.arange(ids.shape[1])
        end = torch.full_like(row, len(row)) if not causal else row + 1
        end[:before] = torch.tensor(shot.edges) if self.block_causal else row[:before] + 1
        ranges = torch.stack([row * 0, end, row * 0, row * 0], dim=-1)[None]
        low = torch.autocast("cpu", dtype=torch.bfloat16) if self.bf16 else contextlib.nullcontext()
        with torch.inference_mode(), low:
            attend = model.attend(ranges, backend="reference")
            told = None
            if self.told >= 0 and not causal:
                told = torch.where(row < before, -1, self.told)[None]
            states = model.hidden(ids, row[None], attend, granularity=told)[0]
            start = before - (self.shift or causal)
            logits = model.logits(states[start : start + n]).float()
            raw = None
            if ends:
                raw = model.edits(torch.cat((states[before : before + n], states[-1:]))).float()
        return torch.softmax(logits, dim=-1).double().numpy(), raw
