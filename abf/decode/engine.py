"""The batched decoding engine: it owns tokens, forward passes, the cache and the randomness.

Requests of different context and block lengths run side by side. One forward pass serves them all:
a request with an open block sends it (every row sees the whole block), one whose block was just
closed sends the delivered tokens (causal, an ordinary AR pass that fills the cache and audits them;
a block that fails its audit may be opened once more). So no request waits for another, and finished
ones leave the batch.

Letters: B requests, M rows of the longest, R rows read. NFE counts the
forward passes a request sends rows to, prefill apart; positions are those rows; the padding of
shorter requests is not counted.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abf.decode.batch import Batch, Layout, MixedAttend, layout, pad
from abf.decode.config import SamplerConfig
from abf.decode.controls import NO_CONTROLS, Controls
from abf.decode.decide import step
from abf.decode.observe import Limits, block_view
from abf.decode.opener import Opener
from abf.decode.prompts import check_prompts
from abf.decode.reading import Said, at, head_of, joined
from abf.decode.request import Prompt, RequestState, Sample
from abf.decode.trace import TraceWriter
from abf.decode.view import ExtentPolicy, RequestMeta, Strategy
from abf.diffusion.rng import uniform
from abf.errors import ConfigError
from abf.model.attention import CacheAttend
from abf.model.cache import KVCache
from abf.model.config import AttentionBackend
from abf.model.transformer import Transformer

TOKEN_STREAM, EDIT_STREAM = 2, 3
"""First counter of the engine's random numbers: what a draw is for; the opener's is 1."""


class Engine:
    """Decodes batches of prompts with one strategy and one extent policy.

    Args:
        model: the transformer; its device is used.
        strategy: what to commit or edit.
        extent: how long a block is.
        sampler: token choice.
        shift: a slot is read from the state before it, a block's first slot from the last committed
            token; else from its own state.
        seed: with the request, block, step and slot it fixes every random number.
        max_steps: decisions a block may take.
        edits_per_slot: how often one slot may be substituted.
        reopen: a closed block is opened once more, with masks for the tokens below this, where its
            mean AR log-probability (nats) is below it.
        controls: what the text may not and must hold, and how long a block may be.
        granularity: mean block length that the model is told, one that it knows; none is told.
        backend: of attention and of the vocabulary head.
        precision: `fp32` or `bf16`.
        clean_stream: `context_causal`, a closed block is written causally; `block_causal`, its rows
            see each other (what such a model was trained on) and there is no AR audit.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        strategy: Strategy,
        extent: ExtentPolicy,
        sampler: SamplerConfig,
        shift: bool,
        seed: int,
        max_steps: int = 256,
        edits_per_slot: int = 4,
        reopen: float | None = None,
        controls: Controls = NO_CONTROLS,
        granularity: int | None = None,
        backend: AttentionBackend = "tiles",
        precision: str = "fp32",
        clean_stream: Literal["context_causal", "block_causal"] = "context_causal",
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise ConfigError(
                f"decoders.*.precision={precision!r} was not resolved when the run was planned; "
                "give fp32 or bf16"
            )
        assert model.config.edit_heads or not strategy.needs_edits, "the model has no edit heads"
        self.model, self.strategy, self.extent, self.sampler = model, strategy, extent, sampler
        self.shift, self.seed, self.reopen = shift, seed, reopen
        self.controls = controls
        self.told = None if granularity is None else model.config.granularities.index(granularity)
        longest = min(model.max_block, controls.max_slots or model.max_block)
        self.limits = Limits(max_steps, longest, edits_per_slot, controls.forbidden)
        self.opener = Opener(
            model, extent, controls,
            seed=seed, told=self.told, most=longest, least=0 if strategy.timed else 1,
        )  # fmt: skip
        self.backend: AttentionBackend = backend
        self.causal = clean_stream == "context_causal"
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.device = model.head_weight.device

    def run(
        self, prompts: Sequence[Prompt], *, new_tokens: int, trace: TraceWriter
    ) -> list[Sample]:
        """Continue every prompt, side by side; samples in the order of the prompts."""
        check_prompts(prompts, new_tokens, config=self.model.config, back=self.extent.back)
        if not prompts:
            return []
        # One context around the whole run: it keeps the cast weights between forward passes.
        lower = (
            torch.autocast(self.device.type, dtype=self.dtype)
            if self.dtype != torch.float32
            else contextlib.nullcontext()
        )
        done: dict[int, Sample] = {}
        began = time.perf_counter()
        with torch.inference_mode(), lower:
            batch = self._prefill(prompts, new_tokens, trace)
            trace.flush()
            while batch.requests:
                self.opener.open(batch)
                self._decide_known(batch)
                trace.closed(self._forward(batch))
                now = time.perf_counter()
                for state in batch.requests:
                    state.wall_s += (now - began) / len(batch.requests)
                began = now
                over = [s.ended and s.closing is None for s in batch.requests]
                if any(over):
                    for state, leaves in zip(batch.requests, over, strict=True):
                        if leaves:
                            done[state.prompt.request] = state.sample()
                    batch.keep([row for row, leaves in enumerate(over) if not leaves])
        return [done[prompt.request] for prompt in prompts]

    def _prefill(self, prompts: Sequence[Prompt], new_tokens: int, trace: TraceWriter) -> Batch:
        """One causal pass over document token and prompt; not counted as NFE."""
        model = self.model
        requests = [
            RequestState(prompt, new_tokens, model.mask_id, model.config.document_id, trace)
            for prompt in prompts
        ]
        ids, lengths = pad([state.context() for state in requests], self.device)
        for state in requests:
            meta = RequestMeta(state.prompt.request, state.length, new_tokens)
            state.strategy_state = self.strategy.start(meta)
        cache = KVCache(
            model.config, len(requests), dtype=self.dtype, device=self.device,
            capacity=ids.shape[1] + 2 * new_tokens,
        )  # fmt: skip
        attend = CacheAttend(cache, query_lengths=lengths, own="causal", backend=self.backend)
        positions = torch.arange(ids.shape[1], device=self.device).expand_as(ids)
        last = torch.arange(len(ids), device=self.device) * ids.shape[1] + lengths - 1
        states = model.hidden(ids, positions, attend, rows=last)
        cache.commit(lengths)
        head = head_of(model, self.sampler, self.controls.forbidden, backend=self.backend)
        return Batch(requests, cache, head, head.read(states))

    def _decide_known(self, batch: Batch) -> None:
        """Decide where only a block's first slot is left and the row that predicts it is known.

        With shift that row is the last committed token's, so a forward pass could tell no more:
        blocks of one slot cost one pass a token, the AR model's price.
        """
        if not self.shift or self.strategy.needs_edits:
            return
        rows = [
            row
            for row, state in enumerate(batch.requests)
            if state.block is not None and state.block.masked().tolist() == [0]
        ]
        if rows:
            slots = [np.zeros(1, dtype=np.intp)] * len(rows)
            self._decide(batch, rows, slots, at(batch.last, rows))

    def _forward(self, batch: Batch) -> int:
        """One pass for everyone; how many tokens of closed blocks it wrote to the cache."""
        end = self.model.end_id if self.model.config.edit_heads else None
        edits = self.strategy.needs_edits
        plan = layout(batch.requests, shift=self.shift, end_id=end, edits=edits)
        ids, lengths = pad(plan.sent, self.device)
        for state, sent in zip(batch.requests, plan.sent, strict=True):
            state.nfe += 1
            state.positions += len(sent)
        causal = torch.zeros(len(ids), dtype=torch.bool, device=self.device)
        causal[plan.closing] = self.causal
        attend = MixedAttend(
            batch.cache, query_lengths=lengths, causal=causal, backend=self.backend
        )
        positions = batch.cache.lengths[:, None] + torch.arange(ids.shape[1], device=self.device)
        told = None
        if self.told is not None:
            told = torch.full_like(ids, self.told)
            told[plan.closing] = -1  # the clean stream is told nothing
        read = self._tensor(plan.read)
        states = self.model.hidden(ids, positions, attend, rows=read, granularity=told)
        said = joined(batch.head.read(states), batch.last)
        written = self._close(batch, plan, said) if plan.closing else 0
        if plan.open:
            raw = None
            if edits:
                own = self._tensor(np.concatenate(plan.own))
                raw = self.model.edits(states[own]).float().cpu().split([*map(len, plan.own)])
            source = self._tensor(plan.source)
            self._decide(batch, plan.open, plan.slots, at(said, source), raw)
        return written

    def _close(self, batch: Batch, plan: Layout, said: Said) -> int:
        """Cache the closed blocks, audit their tokens, keep what the next blocks start from; open
        again what fails the audit. How many tokens were written."""
        sizes = [len(plan.sent[row]) for row in plan.closing]
        if self.causal:
            before = at(said, self._tensor(plan.audit))
            tokens = self._tensor(np.concatenate([plan.sent[r] for r in plan.closing]))
            audit = batch.head.log_probs(before, tokens).cpu().numpy().astype(np.float64)
        else:
            audit = np.full(len(plan.audit), np.nan)
        parts = np.split(audit, np.cumsum(sizes)[:-1])
        lengths = np.zeros(len(batch.requests), dtype=np.int64)
        kept = np.ones(len(plan.closing), dtype=bool)
        for number, (row, log_probs) in enumerate(zip(plan.closing, parts, strict=True)):
            state = batch.requests[row]
            assert state.closing is not None
            if (
                self.reopen is not None
                and log_probs.mean() < self.reopen
                and not state.closing.reopened
            ):
                state.reopen(log_probs < self.reopen, log_probs, self.reopen)
                kept[number] = False
                continue
            lengths[row] = len(log_probs)
            state.written(log_probs)
        rows, last = np.array(plan.closing)[kept], self._tensor(plan.last[kept])
        for kept_of, new in zip(batch.last, at(said, last), strict=True):
            kept_of[rows] = new
        batch.cache.commit(self._tensor(lengths))
        return int(lengths.sum())

    def _decide(
        self,
        batch: Batch,
        rows: list[int],
        slots: list[NDArray[np.intp]],
        said: Said,
        edits: Sequence[Tensor] | None = None,
    ) -> None:
        """Let the strategy act on some requests.

        Args:
            batch: the requests.
            rows: which of them, ascending.
            slots: of each, the slots that were predicted, ascending.
            said: what the head says of all their slots.
            edits: of each, [n+1, E], if the strategy needs it.
        """
        counts = [len(part) for part in slots]
        uniforms = None
        if self.sampler.temperature > 0:
            states = (batch.requests[row] for row in rows)
            keys = [(s.prompt.request, s.blocks, s.block.step) for s in states if s.block]
            each = np.array(keys).repeat(counts, axis=0)
            uniforms = uniform(TOKEN_STREAM, self.seed, *each.T, np.concatenate(slots))
        proposals = batch.head.propose(said, uniforms)
        stops = np.cumsum(counts).tolist()
        for number, (row, stop, slot) in enumerate(zip(rows, stops, slots, strict=True)):
            state = batch.requests[row]
            view = block_view(
                state,
                slot,
                proposals.rows(stop - len(slot), stop),
                limits=self.limits,
                edits=None if edits is None else edits[number],
                uniforms=self._uniforms(state) if self.strategy.timed else None,
                timed=self.strategy.timed,
            )
            step(state, view, self.strategy)

    def _uniforms(self, state: RequestState) -> NDArray[np.float64]:
        """Three random numbers for each slot and gap of the active block at its step, [n+1, 3]."""
        block, number = state.block, state.prompt.request
        assert block is not None
        gap = np.arange(block.live + 1)[:, None]
        return uniform(EDIT_STREAM, self.seed, number, block.number, block.step, gap, np.arange(3))

    def _tensor(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array).to(self.device)
