"""Requests: what is asked, what is delivered, and the explicit state in between.

Letters: n slots of the active block, m slots committed at once. Token counts are new tokens unless
said otherwise; the opening document token is context.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from abf.decode.events import CODE, blank, state_bytes
from abf.decode.trace import TraceWriter


@dataclass(frozen=True)
class Prompt:
    """A text to continue."""

    request: int
    """Its number; randomness is keyed by it, so it must not depend on the batch."""
    prompt_id: str
    token_ids: NDArray[np.integer]
    """Text tokens shown; the engine puts the document token in front."""


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
    """Blocks closed by the step cap."""
    wall_s: float
    """Its share of the time its batches took."""


@dataclass
class ActiveBlock:
    """Slots being denoised."""

    number: int
    uids: NDArray[np.int32]
    ids: NDArray[np.int32]
    committed: NDArray[np.bool_]
    commit_step: NDArray[np.int32]
    commit_confidence: NDArray[np.float32]
    live: int
    """Slots that still count: up to the first committed document token."""
    step: int = 0
    forced: bool = False

    @property
    def delivered(self) -> NDArray[np.int32]:
        """Ids of the live slots, [live]."""
        return self.ids[: self.live]

    def masked(self) -> NDArray[np.intp]:
        """Slots still to be committed."""
        return np.flatnonzero(~self.committed[: self.live])


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
        self._log(blank(len(ids), "PROMPT", uid=uids, left_uid=uids - 1, new_id=ids), -1)
        self.next_uid = self.length = len(ids)
        self.last_uid = len(ids) - 1
        return ids

    def open(self, length: int) -> None:
        """Open a block of `length` masks."""
        assert self.block is None
        assert self.closing is None
        uids = np.arange(self.next_uid, self.next_uid + length, dtype=np.int32)
        events = blank(1 + length, "INSERT")
        events[:1] = blank(1, "OPEN", length=length)
        events["uid"][1:], events["new_id"][1:] = uids, self.mask_id
        events["left_uid"][1], events["left_uid"][2:] = self.last_uid, uids[:-1]
        self._log(events, -1)
        self.next_uid += length
        self.block = ActiveBlock(
            number=self.blocks,
            uids=uids,
            ids=np.full(length, self.mask_id, dtype=np.int32),
            committed=np.zeros(length, dtype=bool),
            commit_step=np.full(length, -1, dtype=np.int32),
            commit_confidence=np.full(length, np.nan, dtype=np.float32),
            live=length,
        )

    def commit(
        self,
        slots: NDArray[np.intp],
        tokens: NDArray[np.integer],
        *,
        prob: NDArray[np.floating],
        entropy: NDArray[np.floating],
        alt_ids: NDArray[np.integer],
        alt_probs: NDArray[np.floating],
        threshold: float,
    ) -> None:
        """Fill and lock masks: slots, tokens, prob, entropy [m]; alternatives [m, k]."""
        block = self.block
        assert block is not None
        m, k = len(slots), alt_ids.shape[1]
        events = blank(2 * m, "COMMIT")
        fill = events[:m]
        fill["type"], fill["old_id"] = CODE["FILL"], self.mask_id
        fill["entropy"], fill["threshold"] = entropy, threshold
        fill["alt_ids"][:, :k], fill["alt_probs"][:, :k] = alt_ids, alt_probs
        for part in (fill, events[m:]):
            part["uid"], part["new_id"], part["prob"] = block.uids[slots], tokens, prob
        self._log(events, block.step)
        block.ids[slots] = tokens
        block.committed[slots] = True
        block.commit_step[slots] = block.step
        block.commit_confidence[slots] = prob
        ends = slots[tokens == self.document_id]
        if len(ends):
            block.live = min(block.live, int(ends.min()) + 1)
        block.step += 1

    def complete(self) -> ActiveBlock:
        """Close the block: deliver its live slots, drop the others."""
        block = self.block
        assert block is not None
        assert block.committed[: block.live].all(), "a delivered slot is still masked"
        kind = "FORCED_COMPLETE" if block.forced else "COMPLETE"
        self._log(blank(1, kind, length=block.live), block.step)
        delivered = block.delivered.tolist()
        self.finished = delivered[-1] == self.document_id
        self.tokens += delivered
        self.tokens_left -= block.live
        assert self.tokens_left >= 0, "more was delivered than asked for"
        self.block_length.append(block.live)
        self.dropped += len(block.ids) - block.live
        self.forced_blocks += block.forced
        self.last_uid = int(block.uids[block.live - 1])
        self.block, self.closing = None, block
        return block

    def written(self, log_probs: NDArray[np.float64]) -> None:
        """The closed block's keys and values are in the cache: AR log_probs [delivered], nats."""
        block = self.closing
        assert block is not None
        with np.errstate(under="ignore"):
            prob = np.exp(log_probs).astype(np.float32)
        uids = block.uids[: block.live]
        writes = blank(len(uids), "KV_WRITE", uid=uids, new_id=block.delivered, prob=prob)
        self._log(writes, block.step)
        self.length += block.live
        self.log_probs += log_probs.tolist()
        self.closing = None
        if self.ended:
            last = self.document_id if self.finished else -1
            self._log(blank(1, "END", length=len(self.tokens), new_id=last), block.step)
        self.blocks += 1

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
        slots = ([], [], []) if block is None else (block.uids, block.ids, block.committed)
        return state_bytes(closed, *slots)
