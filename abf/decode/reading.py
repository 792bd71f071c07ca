"""What the vocabulary head says of rows: all logits, or the few numbers that greedy decoding needs.

Letters: R rows, d width, V vocabulary, k alternatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abf.decode.config import SamplerConfig
from abf.decode.sampler import ALTERNATIVES, Proposals, propose
from abf.diffusion.head import head_likeliest, multiplied
from abf.model.config import AttentionBackend
from abf.model.transformer import Transformer

Said = tuple[Tensor, ...]
"""Of R rows: their states [R, d], then what a `Head` made of them, [R, ...] each."""


class Head(Protocol):
    """The model's vocabulary head and the sampler behind it."""

    def read(self, states: Tensor) -> Said:
        """What is said at states [R, d]."""
        ...

    def log_probs(self, said: Said, tokens: Tensor) -> Tensor:
        """[R] nats, of a token [R] each; before temperature, and of forbidden tokens as well."""
        ...

    def propose(self, said: Said, uniforms: NDArray[np.float64] | None) -> Proposals:
        """A token for each row, drawn by its number in [0, 1) where the sampler draws."""
        ...


def head_of(
    model: Transformer,
    sampler: SamplerConfig,
    forbidden: Sequence[int],
    *,
    backend: AttentionBackend,
) -> Head:
    """All logits where a draw or a forbidden token needs them, else the likeliest tokens alone.

    Args:
        model: its weights, and autocast's dtype, stay as they are while the head is used.
        sampler: how a token is chosen.
        forbidden: tokens that never are.
        backend: of `abf_kernels.masked_loss`.
    """
    if sampler.temperature == 0 and not forbidden:
        return Likeliest(multiplied(model.head_weight), backend)
    return Logits(model, sampler, forbidden)


@dataclass(frozen=True)
class Logits:
    """Says the logits [R, V] float32."""

    model: Transformer
    sampler: SamplerConfig
    forbidden: Sequence[int] = ()

    def read(self, states: Tensor) -> Said:
        """As `Head`."""
        return states, self.model.logits(states).float()

    def log_probs(self, said: Said, tokens: Tensor) -> Tensor:
        """As `Head`."""
        _, logits = said
        return logits.gather(1, tokens.long()[:, None])[:, 0] - logits.logsumexp(dim=-1)

    def propose(self, said: Said, uniforms: NDArray[np.float64] | None) -> Proposals:
        """As `Head`."""
        return propose(said[1], self.sampler, uniforms, self.forbidden)


@dataclass(frozen=True)
class Likeliest:
    """Says entropy [R], ids and probabilities [R, k] of the likeliest tokens; takes the first."""

    matrix: Tensor
    """[V, d], as it is multiplied."""
    backend: AttentionBackend

    def read(self, states: Tensor) -> Said:
        """As `Head`."""
        top = min(ALTERNATIVES, len(self.matrix))
        found = head_likeliest(states, self.matrix, top=top, backend=self.backend)
        return states, found.entropy, found.top_ids, found.top_probs

    def log_probs(self, said: Said, tokens: Tensor) -> Tensor:
        """As `Head`: how far a token's logit lies below the likeliest one's."""
        states, _, ids, probs = said
        wide = probs.dtype
        away = self.matrix[tokens.long()].to(wide) - self.matrix[ids[:, 0]].to(wide)
        below = (states.to(self.matrix.dtype).to(wide) * away).sum(dim=-1)
        return probs[:, 0].log() + below

    def propose(self, said: Said, uniforms: NDArray[np.float64] | None) -> Proposals:
        """As `Head`; needs no numbers."""
        entropy, ids, probs = (part.cpu().numpy() for part in said[1:])
        return Proposals(
            token=ids[:, 0].astype(np.int32),
            confidence=probs[:, 0],
            entropy=entropy,
            top_ids=ids.astype(np.int32),
            top_probs=probs,
        )


def at(said: Said, rows: Tensor | Sequence[int]) -> Said:
    """Some of the rows."""
    return tuple(part[rows] for part in said)


def joined(first: Said, second: Said) -> Said:
    """Rows of the first, then of the second."""
    return tuple(torch.cat(parts) for parts in zip(first, second, strict=True))
