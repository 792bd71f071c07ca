"""Cross-entropy from all logits at once: the oracle, O(R V) memory.

Letters: R rows, d width, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor


def _log_probs(hidden: Tensor, matrix: Tensor, low: torch.dtype) -> Tensor:
    """[R,V]; operands are rounded to `low`, the rest is float32 or higher."""
    wide = torch.promote_types(torch.promote_types(hidden.dtype, low), torch.float32)
    return (hidden.to(low).to(wide) @ matrix.to(low).to(wide).T).log_softmax(dim=1)


def loss(
    hidden: Tensor, matrix: Tensor, target: Tensor, weight: Tensor, low: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The weighted sum, differentiated by autograd, and the weighted nats [R]."""
    log_probs = _log_probs(hidden, matrix, low)
    nats = -log_probs.gather(1, target[:, None])[:, 0] * weight.to(log_probs.dtype)
    return nats.sum(), nats.detach()


def predict(
    hidden: Tensor, matrix: Tensor, target: Tensor | None, top: int, low: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Nats [R], entropy [R], ids and probabilities of the `top` likeliest tokens [R,k]."""
    log_probs = _log_probs(hidden, matrix, low)
    nats = None if target is None else -log_probs.gather(1, target[:, None])[:, 0]
    entropy = torch.special.entr(log_probs.exp()).sum(dim=1)
    best = log_probs.sort(dim=1, descending=True, stable=True)
    return nats, entropy, best.indices[:, :top], best.values[:, :top].exp()
