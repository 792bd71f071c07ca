"""Steps of an event log forwarded anew, from the log alone: a model's numbers beside the logged.

Letters: n live slots of a block, m events, x numbers of an event, V vocabulary, E outputs of the
edit head.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from abf.decode.events import CLOSING, CODE
from abf.decode.replay import Folded
from abf.diffusion.policy.gates import read_gates
from abf.diffusion.policy.need import one_block
from abf.model.transformer import Transformer

_CLOSING = [CODE[name] for name in CLOSING]
_WRITES = [CODE["FILL"], CODE["SUBSTITUTE"]]


@dataclass(frozen=True)
class Shot:
    """A request before one group of events."""

    context: list[int]
    """Prompt and delivered tokens, without those whose keys the group writes."""
    edges: list[int]
    """[context] row up to which each context row sees, in a block-causal clean stream."""
    uids: list[int]
    block: list[int]
    """Ids: of the open block's slots, or of the tokens whose keys are written."""
    live: int


def take_shot(state: Folded, document_id: int) -> Shot:
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
    return Shot(context, edges[: len(context)], list(state.uids), block, live)


class Reader:
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
        self, events: NDArray[Any], shot: Shot
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
        self, events: NDArray[Any], shot: Shot, slot: NDArray[np.intp], raw: torch.Tensor | None
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

    def _read(self, shot: Shot, *, causal: bool) -> tuple[NDArray[np.float64], torch.Tensor | None]:
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
