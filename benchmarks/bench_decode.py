"""Block decoding at a forced number of tokens a step against AR, and what the event log costs.

Both run in the same engine on the same weights (random: speed does not read them), interleaved in
one process on one thread; times are CPU seconds, so that a busy neighbour does not count. How many
tokens a step can be had at what quality is not a question of speed; the report's curve answers it.
Letters: k tokens committed a step, S slots a block, B requests side by side.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from abf.base import build
from abf.decode import engine as engine_room
from abf.decode import request
from abf.decode.config import AbfStrategy, FixedExtent, SamplerConfig
from abf.decode.edits import Edits
from abf.decode.engine import Engine
from abf.decode.reading import Head, Logits, head_of
from abf.decode.replay import replay
from abf.decode.request import Prompt, RequestState
from abf.decode.strategy.abf import Abf
from abf.decode.strategy.ar import Ar
from abf.decode.trace import TraceWriter, read_trace
from abf.decode.view import Action, BlockSummary, BlockView, RequestMeta, Tokens
from abf.hardware import bf16_instructions
from abf.model.config import ModelConfig
from abf.model.transformer import Transformer
from benchmarks.statistics import Row, ratio_row

SHAPE = ModelConfig(
    vocab_size=8192,
    d_model=512,
    layers=8,
    heads=8,
    kv_heads=4,
    head_dim=64,
    d_ff=1408,
    max_positions=512,
)
"""28M parameters."""
QUICK = SHAPE.model_copy(update={"d_model": 128, "layers": 2, "d_ff": 352, "head_dim": 16})
S, PROMPT = 16, 64


def endless(config: ModelConfig) -> Transformer:
    """A random model that never proposes the document token, whose logit is 0 and thus never the
    largest of thousands: every request delivers as many tokens."""
    model = Transformer(config)
    model.initialise(torch.Generator().manual_seed(0))
    with torch.no_grad():
        model.head_weight[config.document_id] = 0
    return model.eval()


def editing(shape: ModelConfig) -> Transformer:
    """As `endless`, with edit heads that ask for edits everywhere: probabilities around a half."""
    model = endless(shape.model_copy(update={"edit_heads": True}))
    with torch.no_grad():
        model.edit_head.weight.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
        model.edit_head.bias.zero_()
    return model


EDITING = AbfStrategy(fill=1.0, substitute=0.0, delete=0.5, insert=0.5, max_insert=1, complete=0)
"""Every operation, as often as the caps of edits allow; masks are filled one by one."""


class Forced:
    """Commit the k surest masks a step."""

    needs_edits = timed = False

    def __init__(self, k: int) -> None:
        self.k = k

    def start(self, meta: RequestMeta) -> None:
        """No state."""

    def decide(self, view: BlockView, state: None) -> Action:
        """The k surest, or what is left."""
        count = min(self.k, int(view.is_mask.sum()))
        surest = np.argsort(np.where(view.is_mask, -view.confidence, np.inf))[:count]
        return Action(commit=Tokens(view.uids[surest], view.token[surest]))

    def end_block(self, summary: BlockSummary, state: None) -> None:
        """Nothing to forget."""


@dataclass
class Times:
    """CPU seconds of one decode."""

    decode: float
    log: float
    replay: float
    events: int = 0
    """In the log."""


def run(quick: bool = False) -> list[Row]:
    """Figures of the table."""
    torch.set_num_threads(1)
    shape = QUICK if quick else SHAPE
    model, edited = endless(shape), editing(shape)
    rounds, new_tokens = (3, 16) if quick else (7, 64)
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    rows: list[Row] = []
    for batch in (1, 8):
        engines: dict[Any, Engine] = {
            "ar": engine(model, None),
            "edits": engine(edited, Abf(EDITING)),
        }
        engines |= {k: engine(model, Forced(k)) for k in (1, 2, 4, 8, 16)}
        times: dict[Any, list[Times]] = {name: [] for name in engines}
        for _ in range(rounds):
            for name, one in engines.items():
                times[name].append(measured(one, batch, new_tokens))
        ar = [t.decode for t in times["ar"]]
        detail = f"{parameters:.0f}M, S={S}, {new_tokens} new tokens, fp32, {rounds} rounds"
        rows += [
            ratio_row(
                f"tokens/s, block at k={k} over AR, B={batch}",
                ar,
                [t.decode for t in times[k]],
                detail,
            )
            for k in (1, 2, 4, 8, 16)
        ]
        labels = {"ar": "AR", 4: "block at k=4", "edits": "all operations"}
        for name, label in labels.items():
            part = times[name]
            done = f"{part[0].events / (batch * new_tokens):.1f} events a token"
            rows.append(
                ratio_row(
                    f"event log's share of decoding, {label}, B={batch}",
                    [t.log for t in part],
                    [t.decode for t in part],
                    f"{done}; goal at most 0.03 of decode time",
                )
            )
            rows.append(
                ratio_row(
                    f"decoding over replaying its log, {label}, B={batch}",
                    [t.decode for t in part],
                    [t.replay for t in part],
                    f"{done}; goal at least 100",
                )
            )
    return rows + head_rows(quick)


def head_rows(quick: bool) -> list[Row]:
    """Reading the likeliest tokens alone, by `masked_loss.predict`, over reading all logits."""
    rows: list[Row] = []
    rounds, new_tokens = (3, 16) if quick else (9, 32)
    heads = {"logits": all_logits, "likeliest": head_of}
    kinds = ["fp32", "bf16"] if bf16_instructions() else ["fp32"]
    for vocab, precision in product((8192, 49152), kinds):
        model = endless((QUICK if quick else SHAPE).model_copy(update={"vocab_size": vocab}))
        for batch, k in product((1, 8), (None, 4)):
            one = engine(model, k and Forced(k), precision=precision)
            times: dict[str, list[float]] = {name: [] for name in heads}
            for number in range(-1, rounds):
                for name, part in times.items():
                    with patch.object(engine_room, "head_of", heads[name]):
                        spent = measured(one, batch, new_tokens).decode
                    if number >= 0:
                        part.append(spent)
            seconds = ", ".join(
                f"{name} {1e3 * statistics.median(part):.0f} ms" for name, part in times.items()
            )
            rows.append(
                ratio_row(
                    f"likeliest tokens over all logits, V={vocab}, {precision}, B={batch}, "
                    + ("AR" if k is None else f"block at k={k}"),
                    times["logits"],
                    times["likeliest"],
                    f"whole decode of {new_tokens} tokens each: {seconds}; {rounds} rounds",
                )
            )
    return rows


def all_logits(
    model: Transformer, sampler: SamplerConfig, forbidden: tuple[int, ...], *, backend: str
) -> Head:
    """As `head_of`, whatever is needed."""
    return Logits(model, sampler, forbidden)


def engine(model: Transformer, strategy: Any, precision: str = "fp32") -> Engine:
    """AR for None, else blocks that are opened with S slots."""
    extent = FixedExtent(length=1 if strategy is None else S)
    return Engine(
        model,
        strategy=strategy or Ar(),
        extent=build(extent, room="abf.decode.extent"),
        sampler=SamplerConfig(),
        shift=True,
        seed=0,
        precision=precision,
    )


def measured(one: Engine, batch: int, new_tokens: int) -> Times:
    """One decode, logged to disk, and the replay of its log; checks that they agree."""
    rng = np.random.default_rng(0)
    prompts = [Prompt(i, str(i), rng.integers(1, 4000, size=PROMPT)) for i in range(batch)]
    config = one.model.config
    header = {"mask_id": config.vocab_size, "document_id": 0, "requests": batch}
    with tempfile.TemporaryDirectory(prefix="bench-decode-") as folder:
        path = Path(folder) / "trace.arrows"
        with logging_seconds() as spent:
            began = time.process_time()
            with TraceWriter(path, {name: str(v) for name, v in header.items()}) as trace:
                samples = one.run(prompts, new_tokens=new_tokens, trace=trace)
            decode = time.process_time() - began
        began = time.process_time()
        found = replay(path)
        replayed = time.process_time() - began
        events = len(read_trace(path)[1])
    assert found == {s.request: s.token_ids.tolist() for s in samples}
    assert all(len(s.token_ids) == new_tokens for s in samples)
    return Times(decode, spent[0], replayed, events)


@contextmanager
def logging_seconds() -> Iterator[list[float]]:
    """CPU seconds spent on making, hashing and writing events inside the block."""
    spent = [0.0]

    def timed(function: Any) -> Any:
        def call(*args: Any, **more: Any) -> Any:
            began = time.process_time()
            try:
                return function(*args, **more)
            finally:
                spent[0] += time.process_time() - began

        return call

    with (
        patch.object(request, "blank", timed(request.blank)),
        patch.object(Edits, "events", timed(Edits.events)),
        patch.object(RequestState, "_log", timed(RequestState._log)),
        patch.object(TraceWriter, "flush", timed(TraceWriter.flush)),
    ):
        yield spent
