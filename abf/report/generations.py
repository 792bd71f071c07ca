"""Generations as blocks of tokens, each with the step that committed it, from the event log.

A step's time on the page is the number of forward passes the request has taken part in (`nfe`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from abf.artifacts import SAMPLES, read_table
from abf.data.tokenizer import TextTokenizer
from abf.decode.events import CLOSING
from abf.decode.page import Shown, history
from abf.decode.replay import Folded
from abf.decode.trace import read_trace
from abf.errors import ArtifactError

END_MARK = "\N{BLACK SQUARE}"
"""Stands for the document token that ends a text."""


@dataclass
class Token:
    """One delivered token."""

    text: str
    nfe: int
    """Forward passes of the request when it was committed."""
    step: int
    """Step inside its block, from 0."""
    prob: float
    """Probability of the token when it was chosen; NaN if the log has none."""
    audit: float
    """Probability the model's AR view gives it, left context only; NaN if it was not audited."""


@dataclass
class Block:
    """One closed block."""

    tokens: list[Token]
    opened: int
    """Slots the block was opened with."""
    steps: int
    forced: bool
    """Ended by the step cap."""


@dataclass
class Generation:
    """One request: prompt, blocks, and what it took."""

    prompt_id: str
    prompt: str
    blocks: list[Block]
    nfe: int
    finished: bool
    """The model ended the document itself."""
    edits: int = 0
    """Tokens that were replaced or deleted, and masks inserted in a block that was open."""
    history: str = ""
    """Every step as HTML, where there were edits."""

    @property
    def tokens(self) -> int:
        """New tokens."""
        return sum(len(block.tokens) for block in self.blocks)

    @property
    def longest_block(self) -> int:
        """Tokens of the longest block."""
        return max((len(block.tokens) for block in self.blocks), default=0)

    @property
    def tokens_per_forward(self) -> float:
        """New tokens over forward passes, those that write keys included."""
        return self.tokens / self.nfe if self.nfe else 0.0


@dataclass
class _Slot:
    new_id: int
    prob: float = float("nan")
    audit: float = float("nan")
    nfe: int = -1
    step: int = -1


@dataclass
class _Fold:
    """Slots of the active block in text order, and the blocks already closed."""

    order: list[int] = field(default_factory=list)
    slots: dict[int, _Slot] = field(default_factory=dict)
    opened: int = 0
    closed: list[tuple[list[_Slot], int, int, bool]] = field(default_factory=list)

    def apply(self, event: dict) -> None:
        kind, uid = event["type"], event["uid"]
        if kind == "OPEN":
            self.order, self.slots, self.opened = [], {}, event["length"]
        elif kind == "INSERT":
            left = event["left_uid"]
            at = self.order.index(left) + 1 if left in self.slots else 0
            self.order.insert(at, uid)
            self.slots[uid] = _Slot(event["new_id"])
        elif kind in ("FILL", "SUBSTITUTE"):
            self.slots[uid].new_id, self.slots[uid].prob = event["new_id"], event["prob"]
        elif kind == "COMMIT":
            slot = self.slots[uid]
            slot.new_id, slot.nfe, slot.step = event["new_id"], event["nfe"], event["step"]
        elif kind == "KV_WRITE":
            self.slots[uid].audit = event["prob"]
        elif kind == "DELETE":
            self.order.remove(uid)
        elif kind == "REOPEN":
            self.order = self.order[: event["length"]]
            self.closed.pop()
        elif kind in CLOSING:
            delivered = [self.slots[uid] for uid in self.order[: event["length"]]]
            forced = kind != "COMPLETE"
            self.closed.append((delivered, self.opened, event["step"], forced))


def read_generations(directory: Path, count: int, tokenizer: TextTokenizer) -> list[Generation]:
    """The first `count` requests of a decode stage directory; where blocks were edited, the one
    with most edits comes before them.

    Raises:
        ArtifactError: log and samples disagree about the text; names the request.
    """
    samples = read_table(directory / "samples.parquet", SAMPLES).to_pylist()
    header, events, _ = read_trace(directory / "trace.arrows")
    edits = edits_of(events)
    samples = sorted(samples, key=lambda sample: sample["request"])
    most = sorted(samples, key=lambda sample: -edits[sample["request"]])[: 1 if edits else 0]
    samples = most + [sample for sample in samples[:count] if sample not in most]
    folds = fold_blocks(events, [sample["request"] for sample in samples])
    found = []
    for sample in samples:
        closed = folds[sample["request"]].closed
        ids = [slot.new_id for slots, *_ in closed for slot in slots]
        if ids != list(sample["token_ids"]):
            raise ArtifactError(
                f"{directory}: the event log of request {sample['request']} gives other tokens "
                "than samples.parquet; rerun the decode"
            )
        strings = tokenizer.token_strings(ids)
        ends = (i == tokenizer.document_id for i in ids)
        texts = (END_MARK if end else s for s, end in zip(strings, ends, strict=True))
        found.append(
            Generation(
                prompt_id=sample["prompt_id"],
                prompt=sample["prompt"],
                blocks=[
                    Block(
                        tokens=[Token(next(texts), s.nfe, s.step, s.prob, s.audit) for s in slots],
                        opened=opened,
                        steps=steps,
                        forced=forced,
                    )
                    for slots, opened, steps, forced in closed
                ],
                nfe=sample["nfe"],
                finished=sample["finished"],
                edits=edits[sample["request"]],
                history=history(
                    events,
                    sample["request"],
                    Folded(int(header["mask_id"])),
                    Shown(int(header["mask_id"]), tokenizer.token_strings),
                    where=str(directory),
                )
                if edits[sample["request"]]
                else "",
            )
        )
    return found


def edits_of(events: pa.Table) -> Counter[int]:
    """Edits of each request that has any, from rows of the EVENTS schema."""
    kind = pc.field("type")
    inserted = (kind == "INSERT") & (pc.field("step") >= 0)
    chosen = events.filter(inserted | kind.isin(["SUBSTITUTE", "DELETE"]))
    return Counter(chosen["request"].to_pylist())


def fold_blocks(events: pa.Table, requests: Sequence[int]) -> dict[int, _Fold]:
    """Closed blocks of some requests from rows of the EVENTS schema."""
    folds = {request: _Fold() for request in requests}
    columns = ["request", "type", "step", "nfe", "uid", "left_uid", "new_id", "prob", "length"]
    for batch in events.select(columns).to_batches():
        for event in batch.to_pylist():
            if event["request"] in folds:
                folds[event["request"]].apply(event)
    return folds
