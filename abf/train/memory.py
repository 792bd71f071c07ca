"""How much memory a training holds at its peak, part by part, computed from shapes alone.

Counts what `abf.train.step` keeps: fp32 weights, gradients and AdamW's two moments; what autograd
saves of every layer; the vocabulary head, which holds one chunk of logits and never all of them
(`abf.diffusion.head`). Not counted: the interpreter and libraries (or a GPU's context, about 0.5
GB), fragments that an allocator leaves, buffers of collectives, and scratch space inside kernels.
Attention is taken to save queries, keys, values and its output, as tiles and flash kernels do.

Letters: B rows a pass, L row length, M noisy slots of a row, T = B (M + L) slots of a pass, R of
them read by a loss, d width, H/G query/kv heads, D head dim, f width of the MLP, V vocabulary,
W ranks. Sizes are bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from abf.diffusion.head import CHUNK
from abf.model.config import ModelConfig

WIDE, LOW = 4, 2
"""Bytes of fp32 and of bf16 numbers."""


@dataclass(frozen=True)
class Pass:
    """One forward and backward pass of a rank."""

    rows: int
    """B."""
    length: int
    """L."""
    read: int
    """R: slots that some term of the loss reads."""
    terms: tuple[int, ...]
    """Rows that each term of the loss sends through the vocabulary head: masks, next tokens."""
    noisy: int | None = None
    """M; None: L, as with masks."""
    precision: Literal["fp32", "bf16"] = "bf16"
    recompute: bool = False
    """`train.checkpoint_activations`."""

    @staticmethod
    def of_masks(rows: int, length: int, **more: Any) -> Pass:
        """Masks with an AR loss, with every token masked: as many rows as can be read."""
        tokens = rows * length
        return Pass(rows=rows, length=length, read=2 * tokens, terms=(tokens, tokens), **more)

    @property
    def slots(self) -> int:
        """T."""
        return self.rows * (self.length + (self.length if self.noisy is None else self.noisy))


@dataclass(frozen=True)
class Spread:
    """How ranks share weights."""

    sharding: Literal["none", "full", "hybrid"] = "none"
    ranks: int = 1
    ranks_per_node: int = 4

    @property
    def shards(self) -> int:
        """Ranks over which one copy of the weights is spread."""
        if self.sharding == "none":
            return 1
        return self.ranks if self.sharding == "full" else min(self.ranks, self.ranks_per_node)


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank at the peak."""

    weights: float
    gradients: float
    moments: float
    gathered: float
    """Whole weights and gradients of what a sharded model is computing."""
    cast: float
    """Copies of the layers' matrices in bf16, which autocast keeps."""
    activations: float
    """What autograd saved, and what the layer at hand needs besides."""
    head: float
    """Logits of a chunk and gradients of the output matrix."""

    @property
    def total(self) -> float:
        """All of it."""
        return sum(vars(self).values())


def parameters(cfg: ModelConfig) -> int:
    """Weights of the transformer, the MASK and the length head included; Llama-like families."""
    outside = cfg.vocab_size * cfg.d_model * (1 if cfg.tie_embeddings else 2)
    heads = cfg.d_model + (1 + cfg.max_block) * (cfg.d_model + 1)
    return outside + cfg.d_model + heads + cfg.layers * _layer(cfg)


def peak_memory(cfg: ModelConfig, work: Pass, spread: Spread = Spread()) -> Memory:
    """The larger of the two moments that can be the peak: the end of the forward pass, when all is
    saved and the head works, and the backward pass through the last layers."""
    total, layer = parameters(cfg), _layer(cfg)
    outside = total - cfg.layers * layer
    shards = spread.shards
    gathered = 0.0
    if shards > 1:
        # The root (embeddings, heads) stays whole from forward to backward, and has a gradient; a
        # layer is gathered while another is computed, and has a gradient before it is scattered.
        gathered = WIDE * (2.0 * outside + 3 * layer)
    cast = LOW * cfg.layers * layer if work.precision == "bf16" else 0.0
    saved = _saved(cfg, work, full=True)
    last = _saved(cfg, work, full=False)
    kept = (cfg.layers - 1) * saved + last
    if work.recompute:
        kept = cfg.layers * WIDE * work.slots * cfg.d_model + _after(cfg, work)
    forward = (kept, _head(cfg, work), cast)

    # Backward: two gradients of the MLP's inner states beside what is saved (the third takes the
    # place of the first), and one of the output matrix, which waits for the embedding's. What came
    # behind the layers is gone by then.
    low = LOW if work.precision == "bf16" else WIDE
    inner = 2 * low * cfg.d_ff + WIDE * cfg.d_model
    kept -= _after(cfg, work)
    waiting = WIDE * cfg.vocab_size * cfg.d_model
    if work.recompute:
        one = LOW * layer if work.precision == "bf16" else 0.0
        then = kept - WIDE * work.slots * cfg.d_model + saved + work.slots * inner
        backward = (then, waiting, one)
    else:
        backward = (
            max(kept + work.read * inner, (cfg.layers - 1) * saved + work.slots * inner),
            waiting,
            cast,
        )
    activations, head, copies = max(forward, backward, key=sum)
    return Memory(
        weights=WIDE * total / shards,
        gradients=WIDE * total / shards,
        moments=2 * WIDE * total / shards,
        gathered=gathered,
        cast=copies,
        activations=activations,
        head=head,
    )


def _layer(cfg: ModelConfig) -> int:
    heads, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    return cfg.d_model * (2 * heads + 2 * kv + 3 * cfg.d_ff + 2)


def _saved(cfg: ModelConfig, work: Pass, *, full: bool) -> float:
    """Bytes that autograd saves of a layer: all rows, or of the last layer, whose second half is
    computed for the rows that are read.

    In front of attention: the input and its scaled form (fp32), the norm's answer as q, k and v
    read it (three casts in bf16, one tensor in fp32); q, k, v and attention's output. Behind:
    the output projection's input, the middle of the residual stream and its scaled form (fp32),
    the norm's answer as two projections read it, and four inner states of the MLP.
    """
    d, f = cfg.d_model, cfg.d_ff
    heads, kv = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    if work.precision == "bf16":
        front = 2 * WIDE * d + LOW * (3 * d + 2 * heads + 2 * kv)
        behind = 2 * WIDE * d + LOW * (heads + 2 * d + 4 * f)
    else:
        front = WIDE * (3 * d + 2 * heads + 2 * kv)
        behind = WIDE * (heads + 3 * d + 4 * f)
    if full:
        return float(work.slots * (front + behind))
    return float(work.slots * front + work.read * behind) + _after(cfg, work)


def _after(cfg: ModelConfig, work: Pass) -> float:
    """The final norm's input, scaled form and answer; the states of each term, whose place their
    gradients take."""
    return WIDE * cfg.d_model * (3.0 * work.read + sum(work.terms))


def _head(cfg: ModelConfig, work: Pass) -> float:
    """The last term's pass through the head: a gradient of the matrix for every term, a product to
    be added to it, and the logits of a chunk."""
    matrix = cfg.vocab_size * cfg.d_model
    chunk = min(max(1, CHUNK // cfg.vocab_size), max(work.terms)) * cfg.vocab_size
    held = float(WIDE * len(work.terms) * matrix)
    if work.precision == "bf16":
        # Softmax has the logits in bf16, in fp32, and its answer.
        low = max(2 * LOW * matrix + (WIDE + LOW) * chunk, LOW * matrix + (2 * WIDE + LOW) * chunk)
        return held + low
    return held + max(WIDE * matrix + WIDE * chunk, 2 * WIDE * chunk)
