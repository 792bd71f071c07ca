"""From logits to proposed tokens with confidence, entropy and alternatives.

Letters: R rows (masked slots of all requests), V vocabulary, k alternatives. Probabilities that are
shown and logged are the model's own (temperature 1); temperature and top-p only decide the draw.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from abf.decode.config import SamplerConfig

ALTERNATIVES = 4
"""k: likeliest tokens shown to strategies and written to the log."""


@dataclass(frozen=True)
class Proposals:
    """One proposed token a row."""

    token: NDArray[np.int32]
    """[R]"""
    confidence: NDArray[np.float32]
    """[R] probability of the token before temperature."""
    entropy: NDArray[np.float32]
    """[R] nats."""
    top_ids: NDArray[np.int32]
    """[R, k]"""
    top_probs: NDArray[np.float32]
    """[R, k], descending."""

    def rows(self, start: int, stop: int) -> Proposals:
        """Proposals of some of the rows."""
        part = slice(start, stop)
        return Proposals(
            self.token[part],
            self.confidence[part],
            self.entropy[part],
            self.top_ids[part],
            self.top_probs[part],
        )

    def margin(self) -> NDArray[np.float32]:
        """Largest minus second largest probability, [R]."""
        if self.top_probs.shape[1] < 2:
            return self.top_probs[:, 0]
        return self.top_probs[:, 0] - self.top_probs[:, 1]


def propose(
    logits: Tensor,
    cfg: SamplerConfig,
    uniforms: NDArray[np.float64] | None,
    forbidden: Sequence[int] = (),
) -> Proposals:
    """Choose a token for each row.

    Args:
        logits: [R, V] float32.
        cfg: temperature 0 takes the likeliest token (the lowest id among equals).
        uniforms: [R] numbers in [0, 1), one a row; not needed at temperature 0.
        forbidden: tokens that are never chosen; what is shown of the model is the same.
    """
    log_probs = torch.log_softmax(logits, dim=-1)
    probs = log_probs.exp()
    top_probs, top_ids = probs.topk(min(ALTERNATIVES, probs.shape[1]), dim=-1)
    if forbidden:
        logits = logits.clone()
        logits[:, list(forbidden)] = -torch.inf
    if cfg.temperature == 0:
        token = logits.argmax(dim=-1)
    else:
        assert uniforms is not None, "sampling needs a random number a row"
        token = draw(logits, cfg, torch.from_numpy(uniforms).to(logits.device))
    # exp(-inf) * -inf is NaN: an impossible token adds nothing to the entropy.
    entropy = -(probs * log_probs).nan_to_num(nan=0.0).sum(dim=-1)
    confidence = probs.gather(1, token.unsqueeze(1)).squeeze(1)
    return Proposals(
        token=token.cpu().numpy().astype(np.int32),
        confidence=confidence.cpu().numpy(),
        entropy=entropy.cpu().numpy(),
        top_ids=top_ids.cpu().numpy().astype(np.int32),
        top_probs=top_probs.cpu().numpy(),
    )


def draw(logits: Tensor, cfg: SamplerConfig, uniforms: Tensor) -> Tensor:
    """Sample from softmax(logits / temperature) cut to its nucleus, by inversion in float64.

    In float32 a Gumbel draw truncates the tail and quietly lowers the temperature (MDM sampling,
    arXiv 2409.02908); inversion in float64 needs one random number a row instead of V.

    Args:
        logits: [R, V].
        cfg: temperature above 0; `top_p` keeps the fewest likeliest tokens that reach that mass.
        uniforms: [R] float64 in [0, 1).

    Returns:
        [R] int64.
    """
    probs = torch.softmax(logits.double() / cfg.temperature, dim=-1)
    if cfg.top_p < 1:
        ordered, order = probs.sort(dim=-1, descending=True, stable=True)
        before = ordered.cumsum(dim=-1) - ordered
        ordered = ordered.masked_fill(before >= cfg.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(1, order, ordered)
    cumulative = probs.cumsum(dim=-1)
    point = (uniforms * cumulative[:, -1]).unsqueeze(1)
    # u < 1, but u * mass may round up to the mass; the last possible token is meant then.
    last = probs.shape[1] - 1 - (probs > 0).flip(1).int().argmax(dim=-1)
    return torch.searchsorted(cumulative, point, right=True).squeeze(1).minimum(last)
