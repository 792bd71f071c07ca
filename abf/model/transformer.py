"""One readable decoder-only transformer: RMSNorm, RoPE, grouped-query attention, SwiGLU.

Options of `ModelConfig` make it a Qwen (biases, norms of query and key heads) or a GPT-2
(LayerNorm, learned positions, GELU); without them it is a Llama.

Letters: B batch rows, M query rows, H/G query/kv heads, D head dim, V vocabulary, S longest block,
d width. Parameters are fp32; mixed precision is the caller's autocast, norms stay in fp32 inside.
Who may see whom is not known here: it comes in as an `Attend`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from abf.diffusion.flops import attention, count, is_counted, products
from abf.diffusion.policy.gates import EDITS
from abf.model.attention import Attend, RangeAttend
from abf.model.config import AttentionBackend, ModelConfig
from abf.model.layers import Layer, norm
from abf.model.rope import rope_frequencies, rope_stretch, rotation


class Transformer(nn.Module):
    """Decoder-only transformer with a MASK input and a block-length head.

    The MASK id is V, the end of a block V+1 (with `edit_heads`): inputs with embeddings of their
    own, never outputs. The length head starts at zero (every length equally likely), so do the edit
    heads but for constants, so that a converted model is its source.

    With `granularities` it can be told one: a vector added to its inputs, and one to the states
    that the length head reads, both zero at first. What is told nothing has neither.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        self.position_embedding = (
            nn.Embedding(config.max_positions, config.d_model)
            if config.positions == "learned"
            else None
        )
        self.mask_embedding = nn.Parameter(torch.zeros(config.d_model))
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = norm(config)
        self.head = (
            None
            if config.tie_embeddings
            else nn.Linear(config.d_model, config.vocab_size, bias=False)
        )
        self.length_head = nn.Linear(config.d_model, 1 + config.max_block)
        nn.init.zeros_(self.length_head.weight)
        nn.init.zeros_(self.length_head.bias)
        if config.edit_heads:
            self.end_embedding = nn.Parameter(torch.zeros(config.d_model))
            self.edit_head = nn.Linear(config.d_model, len(EDITS))
        if count := len(config.granularities):
            self.granularity_input = nn.Parameter(torch.zeros(count, config.d_model))
            self.granularity_length = nn.Parameter(torch.zeros(count, config.d_model))
        self.rope: Tensor
        self.register_buffer("rope", rope_frequencies(config), persistent=False)

    @property
    def mask_id(self) -> int:
        """Input id of MASK."""
        return self.config.vocab_size

    @property
    def max_block(self) -> int:
        """S, longest block."""
        return self.config.max_block

    @property
    def end_id(self) -> int:
        """Input id of the end of a block."""
        return self.config.vocab_size + 1

    @property
    def head_weight(self) -> Tensor:
        """Output matrix [V, d]: the embedding itself when they are tied."""
        return self.embedding.weight if self.head is None else self.head.weight

    def initialise(self, generator: torch.Generator, *, std: float = 0.02) -> None:
        """Set every weight of a model trained from scratch.

        Matrices are normal, `std`; what is added to the residual stream is scaled by
        1/sqrt(2*layers) (GPT-2). Norms are one, biases and the length head zero, MASK the mean
        embedding.
        """
        residual = std / math.sqrt(2 * self.config.layers)
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                if name.startswith(("length_head", "granularity_")) or name.endswith(".bias"):
                    parameter.zero_()
                elif parameter.dim() == 1:
                    parameter.fill_(1.0)
                else:
                    added = name.endswith(("attention.o.weight", "mlp.down.weight"))
                    parameter.normal_(0.0, residual if added else std, generator=generator)
        self.reset_mask_embedding()

    def reset_mask_embedding(self) -> None:
        """Set MASK to the mean token embedding.

        Near-zero mask embeddings make gradients explode early in conversion (LLaDA 2.0 report).
        """
        with torch.no_grad():
            self.mask_embedding.copy_(self.embedding.weight.mean(dim=0))

    def reset_edit_heads(self) -> None:
        """Set the edit head to constants, and the end of a block to the document token.

        Nothing is missing, nothing wrong beyond what the noise makes likely, nothing complete.
        """
        start = {"insert": -2.0, "revise": -4.0, "delete": -4.0, "missing": -4.0, "complete": -2.0}
        with torch.no_grad():
            self.end_embedding.copy_(self.embedding.weight[self.config.document_id])
            self.edit_head.weight.zero_()
            self.edit_head.bias.copy_(torch.tensor([start.get(name, 0.0) for name in EDITS]))

    def reset_granularities(self) -> None:
        """Make no difference whatever the model is told."""
        with torch.no_grad():
            self.granularity_input.zero_()
            self.granularity_length.zero_()

    def embed(self, ids: Tensor) -> Tensor:
        """[B, M] ids in 0..V+1 (V is MASK, V+1 the end of a block) -> [B, M, d]."""
        tokens = self.embedding(ids.masked_fill(ids >= self.mask_id, 0))
        found = torch.where((ids == self.mask_id).unsqueeze(-1), self.mask_embedding, tokens)
        if not self.config.edit_heads:
            return found
        return torch.where((ids == self.end_id).unsqueeze(-1), self.end_embedding, found)

    def hidden(
        self,
        ids: Tensor,
        positions: Tensor,
        attend: Attend,
        *,
        rows: Tensor | None = None,
        granularity: Tensor | None = None,
    ) -> Tensor:
        """States after the final norm.

        Args:
            ids: [B, M] int64 in 0..V; V is MASK.
            positions: [B, M] int64, from 0 at the start of each piece.
            attend: who sees whom.
            rows: [R] int64 flat indices into B*M; other rows only give keys and values in the last
                layer, their MLP there and the final norm are not computed, nor are their queries if
                there is one batch row.
            granularity: [B, M] int64, number of the granularity a row is told, -1 for none.

        Returns:
            [B, M, d], or [R, d] when `rows` is given.
        """
        x = self.embed(ids)
        if granularity is not None:
            x = x + _rows_or_zero(self.granularity_input, granularity)
        if self.position_embedding is not None:
            # Texts fit the table (the engine and the training step refuse others); what is clamped
            # is padding, the end of a block that ends at the last position, and of a draft longer
            # than its block the slots behind that: in training and decoding alike.
            x = x + self.position_embedding(positions.clamp(max=self.config.max_positions - 1))
        cos, sin = rotation(positions, self.rope, stretch=rope_stretch(self.config))
        if is_counted() and isinstance(attend, RangeAttend):
            self._count(attend.ranges, rows)
        last = len(self.layers) - 1
        for number, layer in enumerate(self.layers):
            x = layer(x, cos, sin, number, attend, rows if number == last else None)
        return self.norm(x)

    def _count(self, ranges: Tensor, rows: Tensor | None) -> None:
        """Count the layers over slots that see something; padding does not. In the last layer only
        slots that are read have a query, see and go on."""
        seen = (ranges[..., 1::2] - ranges[..., ::2]).sum(dim=-1).flatten()
        sent, read = int((seen > 0).sum()), seen if rows is None else seen[rows.unique()]
        last: Any = self.layers[-1]
        asked = (last.attention.q, last.attention.o, last.mlp)
        width = self.config.heads * self.config.head_dim
        count(
            products(sent, matrix_weights(self.layers))
            - products(sent - int((read > 0).sum()), sum(matrix_weights(part) for part in asked))
            + attention(int(seen.sum()), width, len(self.layers) - 1)
            + attention(int(read.sum()), width, 1)
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., V]."""
        count(products(hidden.shape[:-1].numel(), self.head_weight.numel()))
        return F.linear(hidden, self.head_weight)

    def length_logits(self, hidden: Tensor, granularity: Tensor | None = None) -> Tensor:
        """[..., d] -> [..., S+1]; entry j is a next block that is opened with j slots.

        Args:
            hidden: states of the tokens before the blocks.
            granularity: [...] int64, as in `hidden`.
        """
        if granularity is not None:
            # Not to the logits: Adam moves a number by about lr a step, a product of two by more.
            hidden = hidden + _rows_or_zero(self.granularity_length, granularity)
        return self.length_head(hidden)

    def edits(self, hidden: Tensor) -> Tensor:
        """[..., d] -> [..., len(EDITS)], at least fp32."""
        found = self.edit_head(hidden)
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def attend(self, ranges: Tensor, *, backend: AttentionBackend) -> Attend:
        """Attention over the given key ranges [B, M, 4], for callers below this room."""
        return RangeAttend(ranges, backend=backend)


def _rows_or_zero(table: Tensor, number: Tensor) -> Tensor:
    """[n, d] and [...] in -1..n-1 -> [..., d]: a row of the table, zeros for -1."""
    return F.embedding(number + 1, F.pad(table, (0, 0, 1, 0)))


def matrix_weights(module: nn.Module) -> int:
    """Weights that every row through a module is multiplied with: all but vectors."""
    return sum(p.numel() for p in module.parameters() if p.dim() == 2)
