"""The batched decoding engine: it owns tokens, forward passes, the cache and the randomness.

Requests of different context and block lengths run side by side. One forward pass serves them all:
a request whose block still holds masks sends its block (every row sees the whole block), one whose
block was just closed sends the delivered tokens (causal, an ordinary AR pass that fills the cache
and audits them). So no request waits for another, and finished ones leave the batch.

Letters: B requests, M rows of the longest, R rows read, d width, V vocabulary. NFE counts the
forward passes a request sends rows to, prefill apart; positions are those rows; the padding of
shorter requests is not counted.
"""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Sequence
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abf.base import build
from abf.decode.batch import Batch, Layout, MixedAttend, layout, pad
from abf.decode.config import DecoderConfig, FixedExtent, SamplerConfig
from abf.decode.decide import block_view, step
from abf.decode.request import Prompt, RequestState, Sample
from abf.decode.sampler import propose
from abf.decode.trace import TraceWriter
from abf.decode.view import ExtentPolicy, ExtentView, RequestMeta, Strategy
from abf.diffusion.rng import uniform
from abf.errors import ConfigError
from abf.model.attention import CacheAttend
from abf.model.cache import KVCache
from abf.model.config import AttentionBackend
from abf.model.transformer import Transformer
from abf.track.progress import Progress

EXTENT_STREAM, TOKEN_STREAM = 1, 2
"""First counter of the engine's random numbers: what a draw is for."""


class Engine:
    """Decodes batches of prompts with one strategy and one extent policy.

    Args:
        model: the transformer; its device is used.
        strategy: what to commit.
        extent: how long a block is.
        sampler: token choice.
        shift: a slot is read from the state before it, a block's first slot from the last committed
            token; else from its own state.
        seed: with the request, block, step and slot it fixes every random number.
        max_steps: decisions a block may take.
        backend: attention back end.
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
        backend: AttentionBackend = "reference",
        precision: str = "fp32",
        clean_stream: Literal["context_causal", "block_causal"] = "context_causal",
    ) -> None:
        if precision not in ("fp32", "bf16"):
            raise ConfigError(
                f"decoders.*.precision={precision!r} was not resolved when the run was planned; "
                "give fp32 or bf16"
            )
        self.model, self.strategy, self.extent, self.sampler = model, strategy, extent, sampler
        self.shift, self.seed, self.max_steps = shift, seed, max_steps
        self.backend: AttentionBackend = backend
        self.causal = clean_stream == "context_causal"
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.device = model.head_weight.device

    def run(
        self, prompts: Sequence[Prompt], *, new_tokens: int, trace: TraceWriter
    ) -> list[Sample]:
        """Continue every prompt, side by side; samples in the order of the prompts."""
        self._check(prompts, new_tokens)
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
                self._open(batch)
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

    def _check(self, prompts: Sequence[Prompt], new_tokens: int) -> None:
        limit = self.model.config.max_positions
        for prompt in prompts:
            slots = 1 + len(prompt.token_ids) + new_tokens
            if slots > limit:
                raise ConfigError(
                    f"prompt {prompt.prompt_id!r}: 1 + {len(prompt.token_ids)} prompt tokens + "
                    f"{new_tokens} new tokens = {slots}, but the model has {limit} positions"
                )

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
        return Batch(requests, cache, states, model.logits(states).float())

    def _open(self, batch: Batch) -> None:
        """Open a block for every request without one."""
        opening = [
            row for row, s in enumerate(batch.requests) if s.block is None and s.closing is None
        ]
        if not opening:
            return
        probs: Sequence[NDArray[np.float64] | None] = [None] * len(opening)
        if self.extent.needs_lengths:
            # Whoever cannot insert needs a slot to begin with.
            logits = self.model.length_logits(batch.last_state[opening])[:, 1:].double()
            probs = list(torch.softmax(logits, dim=-1).cpu().numpy())
        for row, length_probs in zip(opening, probs, strict=True):
            state = batch.requests[row]
            number = state.prompt.request
            view = ExtentView(
                request=number,
                block=state.blocks,
                tokens_left=state.tokens_left,
                length_probs=length_probs,
                uniform=float(uniform(EXTENT_STREAM, self.seed, number, state.blocks)),
            )
            length = self.extent.next_extent(view).length
            assert length >= 1, f"{type(self.extent).__name__} opened nothing"
            state.open(min(length, state.tokens_left))

    def _decide_known(self, batch: Batch) -> None:
        """Decide where only a block's first slot is left and the row that predicts it is known.

        With shift that row is the last committed token's, so a forward pass could tell no more:
        blocks of one slot cost one pass a token, the AR model's price.
        """
        rows = [
            row
            for row, state in enumerate(batch.requests)
            if state.block is not None and state.block.masked().tolist() == [0]
        ]
        if self.shift and rows:
            which, slot = np.array(rows), np.zeros(len(rows), dtype=np.intp)
            self._decide(batch, which, slot, batch.last_logits[rows])

    def _forward(self, batch: Batch) -> int:
        """One pass for everyone; how many tokens of closed blocks it wrote to the cache."""
        end = self.model.end_id if self.model.config.edit_heads else None
        plan = layout(batch.requests, shift=self.shift, end_id=end)
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
        states = self.model.hidden(ids, positions, attend, rows=self._tensor(plan.read))
        logits = torch.cat((self.model.logits(states).float(), batch.last_logits))
        if plan.closing:
            self._close(batch, plan, states, logits)
        if len(plan.slot):
            self._decide(batch, plan.which, plan.slot, logits[self._tensor(plan.source)])
        return len(plan.audit)

    def _close(self, batch: Batch, plan: Layout, states: Tensor, logits: Tensor) -> None:
        """Cache the closed blocks, audit their tokens, keep what the next blocks start from."""
        lengths = np.zeros(len(batch.requests), dtype=np.int64)
        lengths[plan.closing] = [len(plan.sent[row]) for row in plan.closing]
        batch.cache.commit(self._tensor(lengths))
        if self.causal:
            before = logits[self._tensor(plan.audit)]
            target = self._tensor(np.concatenate([plan.sent[r] for r in plan.closing]))
            picked = before.gather(1, target.long().unsqueeze(1)).squeeze(1)
            audit = (picked - before.logsumexp(dim=-1)).cpu().numpy().astype(np.float64)
        else:
            audit = np.full(len(plan.audit), np.nan)
        last = self._tensor(plan.last)
        batch.last_state[plan.closing] = states[last]
        batch.last_logits[plan.closing] = logits[last]
        parts = np.split(audit, np.cumsum(lengths[plan.closing])[:-1])
        for row, log_probs in zip(plan.closing, parts, strict=True):
            batch.requests[row].written(log_probs)

    def _decide(
        self, batch: Batch, which: NDArray[np.intp], slot: NDArray[np.intp], logits: Tensor
    ) -> None:
        """Let the strategy act on every request that has rows here.

        Args:
            batch: the requests.
            which: [R] request of each row, ascending.
            slot: [R] masked slot of each row, ascending within a request.
            logits: [R, V].
        """
        uniforms = None
        if self.sampler.temperature > 0:
            states = (batch.requests[row] for row in which)
            keys = [(s.prompt.request, s.blocks, s.block.step) for s in states if s.block]
            uniforms = uniform(TOKEN_STREAM, self.seed, *np.array(keys).T, slot)
        proposals = propose(logits, self.sampler, uniforms)
        bounds = np.flatnonzero(np.diff(which, prepend=-1, append=-1))
        for a, b in itertools.pairwise(bounds.tolist()):
            state = batch.requests[which[a]]
            view = block_view(state, slot[a:b], proposals.rows(a, b), max_steps=self.max_steps)
            step(state, view, self.strategy)

    def _tensor(self, array: NDArray[np.integer]) -> Tensor:
        return torch.from_numpy(array).to(self.device)


def decode(
    cfg: DecoderConfig,
    *,
    model: Transformer,
    shift: bool,
    prompts: Sequence[Prompt],
    new_tokens: int,
    seed: int,
    trace: TraceWriter,
    clean_stream: Literal["context_causal", "block_causal"] = "context_causal",
    label: str = "decode",
) -> list[Sample]:
    """Continue every prompt as the config says, `batch_size` side by side.

    Strategy `ar` is the same engine with blocks of one slot, read from the last committed token
    whatever `shift` says.
    """
    engine = Engine(
        model,
        strategy=build(cfg.strategy, room="abf.decode.strategy"),
        extent=build(cfg.extent or FixedExtent(length=1), room="abf.decode.extent"),
        sampler=cfg.sampler,
        shift=shift or cfg.extent is None,
        seed=seed,
        max_steps=cfg.max_steps_per_block,
        backend=cfg.attention,
        precision=cfg.precision,
        clean_stream=clean_stream,
    )
    samples: list[Sample] = []
    with Progress(label, len(prompts), unit="prompt") as progress:
        for start in range(0, len(prompts), cfg.batch_size):
            part = prompts[start : start + cfg.batch_size]
            samples += engine.run(part, new_tokens=new_tokens, trace=trace)
            nfe = sum(sample.nfe for sample in samples)
            tokens = sum(len(sample.token_ids) for sample in samples)
            progress.update(len(part), tokens_per_forward=tokens / nfe)
    return samples
