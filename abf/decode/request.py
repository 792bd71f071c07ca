"""Requests: what is asked, what is delivered, and the explicit state in between.

Letters: n slots of the active block. Token counts are new tokens unless said otherwise; the opening
document token is context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abf.decode.edits import ActiveBlock, Edits, masks
from abf.decode.events import blank, state_bytes
from abf.decode.trace import TraceWriter


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    request: int
    """Its number; randomness is keyed by it, so it must not depend on the batch."""
    prompt_id: str
    token_ids: NDArray[np.integer]
    """Text tokens shown; the engine puts the document token in front."""
    block_length: tuple[int, ...] = ()
    """Tokens of each of its blocks, as far as they are known; the last one ends the prompt."""


@dataclass(frozen=True)
class Sample:
    """A finished continuation."""

    request: int
    prompt_id: str
    prompt_ids: NDArray[np.uint32]
    token_ids: NDArray[np.uint32]
    """New tokens, the closing document token included if there is one."""
    block_length: list[int]
    """Delivered tokens of each block."""
    log_probs: NDArray[np.float64]
    """Audit: nats the same model gives each new token as an AR model; NaN where the clean stream is
    not causal."""
    nfe: int
    """Forward passes it took part in; prefill apart."""
    positions: int
    """Query rows processed for it in those."""
    finished: bool
    """It ended with the document token."""
    dropped: int
    """Slots opened behind the document token and thrown away."""
    forced_blocks: int
    """Blocks closed before the strategy was done with them: by the step cap, or by its clock."""
    stalled_blocks: int
    """Blocks closed because nothing was left to do, though the strategy would not close them."""
    oscillating_blocks: int
    """Blocks that came back to a text they had been before."""
    reopened_blocks: int
    """Blocks opened once more after their audit."""
    edits: dict[str, int]
    """How many events of each type changed the text; what a block opens with is not counted."""
    wall_s: float
    """Its share of the time its batches took."""


@dataclass
class RequestState:
    """One request on its way; every change is an event in the log."""

    prompt: Prompt
    tokens_left: int
    mask_id: int
    document_id: int
    trace: TraceWriter
    strategy_state: Any = None
    length: int = 0
    """Tokens committed to the cache, context included."""
    next_uid: int = 0
    last_uid: int = -1
    block: ActiveBlock | None = None
    closing: ActiveBlock | None = None
    """The closed block whose delivered tokens are not in the cache yet."""
    blocks: int = 0
    tokens: list[int] = field(default_factory=list)
    block_length: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    nfe: int = 0
    positions: int = 0
    dropped: int = 0
    forced_blocks: int = 0
    stalled_blocks: int = 0
    oscillating_blocks: int = 0
    reopened_blocks: int = 0
    edits: dict[str, int] = field(
        default_factory=lambda: dict.fromkeys(("FILL", "SUBSTITUTE", "DELETE", "INSERT"), 0)
    )
    wall_s: float = 0.0
    finished: bool = False

    @property
    def ended(self) -> bool:
        """Nothing more is to be generated."""
        return self.finished or self.tokens_left == 0

    def context(self) -> list[int]:
        """Document token and prompt, [P]; logs them."""
        ids = [self.document_id, *self.prompt.token_ids.tolist()]
        uids = np.arange(len(ids))
        events = blank(len(ids), "PROMPT", uid=uids, left_uid=uids - 1, new_id=ids)
        blocks = np.array(self.prompt.block_length, dtype=np.intp)
        events["length"][len(ids) - blocks[::-1].cumsum()[::-1]] = blocks
        self._log(events, -1)
        self.next_uid = self.length = len(ids)
        self.last_uid = len(ids) - 1
        return ids

    def earlier(self, back: int) -> NDArray[np.int32]:
        """Tokens of the finished block so many before the next one, the prompt's counted."""
        lengths = [*self.prompt.block_length, *self.block_length][-back:]
        text = np.concatenate([self.prompt.token_ids, self.tokens])
        start = len(text) - sum(lengths)
        return text[start : start + lengths[0]].astype(np.int32)

    def open(
        self,
        length: int,
        held: tuple[NDArray[np.intp], NDArray[np.integer]] | None = None,
        *,
        lock: bool = True,
    ) -> None:
        """Open a block of `length` masks; of these the slots of `held` are filled, and locked."""
        assert self.block is None
        assert self.closing is None
        uids = np.arange(self.next_uid, self.next_uid + length, dtype=np.int32)
        events = blank(1 + length, "INSERT")
        events[:1] = blank(1, "OPEN", length=length)
        events["uid"][1:], events["new_id"][1:] = uids, self.mask_id
        events["left_uid"][1:2], events["left_uid"][2:] = self.last_uid, uids[:-1]
        slots = masks(uids, self.mask_id, step=-1)
        block = ActiveBlock(
            number=self.blocks, slots=slots, live=length, mask_id=self.mask_id, opened=length
        )
        self.next_uid += length
        if held is None:
            self._log(events, -1)
        else:
            slots, tokens = held
            edits = Edits(write=slots, tokens=tokens, lock=slots[: lock * len(slots)])
            self._edit(block, edits, events, -1)
        self.block = block

    def apply(self, edits: Edits) -> None:
        """Do one step's operations on the active block."""
        block = self.block
        assert block is not None
        self._edit(block, edits, None, block.step)
        block.step += 1

    def complete(self, *, gate: float = float("nan"), threshold: float = float("nan")) -> None:
        """Close the block; `gate` is the probability that it is complete, `threshold` the bar."""
        block = self.block
        assert block is not None
        assert block.live, "a block of nothing is delivered"
        assert block.locked[: block.live].all(), "a delivered slot is not locked"
        kind = "STALLED_COMPLETE" if block.stalled else "COMPLETE"
        kind = "FORCED_COMPLETE" if block.forced else kind
        event = blank(1, kind, length=block.live, gate=gate, threshold=threshold)
        self._log(event, block.step)
        self.block, self.closing = None, block

    def written(self, log_probs: NDArray[np.float64]) -> None:
        """The closed block's keys and values are in the cache, so it is delivered: AR log_probs
        [delivered], nats."""
        block = self.closing
        assert block is not None
        uids = block.uids[: block.live]
        writes = blank(len(uids), "KV_WRITE", uid=uids, new_id=block.delivered)
        writes["prob"] = _probability(log_probs)
        self._log(writes, block.step)
        delivered = block.delivered.tolist()
        self.length += block.live
        self.log_probs += log_probs.tolist()
        self.closing = None
        self.finished = delivered[-1] == self.document_id
        self.tokens += delivered
        self.tokens_left -= block.live
        assert self.tokens_left >= 0, "more was delivered than asked for"
        self.block_length.append(block.live)
        self.dropped += len(block.ids) - block.live
        self.forced_blocks += block.forced
        self.stalled_blocks += block.stalled
        self.oscillating_blocks += block.oscillates
        self.reopened_blocks += block.reopened
        self.last_uid = int(uids[-1])
        if self.ended:
            last = self.document_id if self.finished else -1
            self._log(blank(1, "END", length=len(self.tokens), new_id=last), block.step)
        self.blocks += 1

    def reopen(self, bad: NDArray[np.bool_], log_probs: NDArray[np.float64], bar: float) -> None:
        """Open the closed block once more, with masks for its bad slots.

        Args:
            bad: [delivered] slots to be done anew.
            log_probs: [delivered] AR nats of the audit.
            bar: mean nats that the audit should have reached.
        """
        block = self.closing
        assert block is not None
        self.dropped += len(block.ids) - block.live
        slots = np.flatnonzero(bad)
        first = np.concatenate([slots[:1], slots[1:][np.diff(slots) > 1]])
        edits = Edits(
            delete=slots,
            gaps=first,
            counts=np.diff(np.append(np.searchsorted(slots, first), len(slots))),
            delete_gate=_probability(log_probs[slots]),
        )
        event = blank(1, "REOPEN", length=block.live, threshold=_probability(bar))
        event["prob"] = _probability(log_probs.mean())
        block.slots = block.slots[: block.live].copy()
        block.slots["locked"], block.slots["commit_step"] = False, -1
        self._edit(block, edits, event, block.step)
        self.block, self.closing = block, None
        block.step += 1
        block.forced, block.stalled, block.reopened = False, False, True

    def _edit(
        self, block: ActiveBlock, edits: Edits, before: NDArray[Any] | None, step: int
    ) -> None:
        """Log, behind the events `before` of the same group, and apply."""
        slots = block.slots
        events = edits.events(slots, self.mask_id, left_uid=self.last_uid, first_uid=self.next_uid)
        if before is not None:
            events = np.concatenate([before, events])
        if len(events):
            self._log(events, step)
        block.slots = edits.slots(slots, self.mask_id, first_uid=self.next_uid, step=step)
        self.next_uid += int(edits.counts.sum())
        ends = np.flatnonzero(block.locked & (block.ids == self.document_id))
        block.live = int(ends[0]) + 1 if len(ends) else len(block.slots)
        if step < 0:
            return  # an opening
        substituted = int((slots["id"][edits.write] != self.mask_id).sum())
        for kind, count in (
            ("FILL", len(edits.write) - substituted),
            ("SUBSTITUTE", substituted),
            ("DELETE", len(edits.delete)),
            ("INSERT", int(edits.counts.sum())),
        ):
            self.edits[kind] += count

    def sample(self) -> Sample:
        """What is delivered."""
        return Sample(
            request=self.prompt.request,
            prompt_id=self.prompt.prompt_id,
            prompt_ids=self.prompt.token_ids.astype(np.uint32),
            token_ids=np.array(self.tokens, dtype=np.uint32),
            block_length=self.block_length,
            log_probs=np.array(self.log_probs),
            nfe=self.nfe,
            positions=self.positions,
            finished=self.finished,
            dropped=self.dropped,
            forced_blocks=self.forced_blocks,
            stalled_blocks=self.stalled_blocks,
            oscillating_blocks=self.oscillating_blocks,
            reopened_blocks=self.reopened_blocks,
            edits=self.edits,
            wall_s=self.wall_s,
        )

    def _log(self, events: NDArray[Any], step: int) -> None:
        events["request"], events["step"] = self.prompt.request, step
        events["nfe"] = self.nfe
        # Context belongs to no block; a block is counted once it is written.
        events["block"] = self.blocks if self.next_uid else -1
        self.trace.write(events, self._state())

    def _state(self) -> bytes:
        block = self.block
        # A closed block waiting for its keys is behind us already, as in the folded log.
        closed = self.length + (0 if self.closing is None else self.closing.live)
        slots = ([], [], []) if block is None else (block.uids, block.ids, block.locked)
        return state_bytes(closed, *slots)


def _probability(nats: NDArray[np.float64] | float) -> Any:
    with np.errstate(under="ignore"):
        return np.exp(nats).astype(np.float32)
