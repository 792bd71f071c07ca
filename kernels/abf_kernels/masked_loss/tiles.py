"""Cross-entropy by chunks of rows: GEMM, softmax and both gradients in one pass over the logits.

Letters: R rows, d width, V vocabulary, k likeliest tokens. Each row's weight is known beforehand,
so gradients are computed where the logits are: none are kept and none are computed twice. Same idea
as Liger's fused linear cross-entropy (arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 25
"""Logits held at once, in elements (128 MiB in fp32)."""


def loss(
    hidden: Tensor, matrix: Tensor, target: Tensor, weight: Tensor, low: torch.dtype, grads: bool
) -> tuple[Tensor, Tensor]:
    """The weighted sum and the weighted nats [R]; gradients are computed if `grads`."""
    total, nats = _Loss.apply(hidden, matrix, target, weight, low, grads)
    return total, nats


class _Loss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        matrix: Tensor,
        target: Tensor,
        weight: Tensor,
        low: torch.dtype,
        grads: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(torch.promote_types(hidden.dtype, low), torch.float32)
        nats = torch.empty(len(hidden), dtype=wide, device=hidden.device)
        grad_hidden = torch.empty_like(hidden) if grads else None
        # Chunks add up, so not in a narrow dtype.
        sums = torch.promote_types(matrix.dtype, torch.float32)
        grad_matrix = torch.zeros_like(matrix, dtype=sums) if grads else None
        low_hidden, low_matrix = _multiplied(hidden, low), _multiplied(matrix, low)
        for part in parts(hidden, matrix):
            # One pass converts to fp32 and normalises.
            log_probs = (low_hidden[part] @ low_matrix.T).log_softmax(dim=1, dtype=wide)
            picked = target[part, None]
            nats[part] = -log_probs.gather(1, picked)[:, 0]
            if grad_hidden is None or grad_matrix is None:
                continue
            # d nats / d logits = softmax - one-hot, written over the log-probabilities.
            slope = log_probs.exp_()
            slope.scatter_add_(1, picked, slope.new_full(picked.shape, -1.0))
            slope = slope.mul_(weight[part, None].to(wide)).to(low_matrix.dtype)
            grad_hidden[part] = slope @ low_matrix
            grad_matrix += slope.T @ low_hidden[part]
        nats.mul_(weight)
        if grad_matrix is not None:
            ctx.save_for_backward(grad_hidden, grad_matrix.to(matrix.dtype))
        ctx.mark_non_differentiable(nats)
        return nats.sum(), nats

    @staticmethod
    @once_differentiable  # untyped in torch, hence:
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_hidden, grad_matrix = ctx.saved_tensors
        grad_total = grad_outputs[0]
        return grad_hidden * grad_total, grad_matrix * grad_total, None, None, None, None


def predict(
    hidden: Tensor, matrix: Tensor, target: Tensor | None, top: int, low: torch.dtype
) -> tuple[Tensor | None, Tensor, Tensor, Tensor]:
    """Nats [R], entropy [R], ids and probabilities of the `top` likeliest tokens [R,k]."""
    wide = torch.promote_types(torch.promote_types(hidden.dtype, low), torch.float32)
    R = len(hidden)
    entropy = torch.empty(R, dtype=wide, device=hidden.device)
    nats = None if target is None else torch.empty_like(entropy)
    top_ids = torch.empty(R, top, dtype=torch.int64, device=hidden.device)
    top_probs = torch.empty(R, top, dtype=wide, device=hidden.device)
    low_matrix = _multiplied(matrix, low)
    for part in parts(hidden, matrix):
        log_probs = (_multiplied(hidden[part], low) @ low_matrix.T).log_softmax(dim=1, dtype=wide)
        if nats is not None and target is not None:
            nats[part] = -log_probs.gather(1, target[part, None])[:, 0]
        top_ids[part], top_probs[part] = _likeliest(log_probs, top)
        probs = log_probs.exp()
        # exp(-inf) * -inf is NaN, but an impossible token adds nothing; a true NaN stays one.
        log_probs.clamp_(min=torch.finfo(wide).min)
        entropy[part] = -log_probs.mul_(probs).sum(dim=1)
    return nats, entropy, top_ids, top_probs


def _likeliest(log_probs: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """[R,k] ids and probabilities; `topk` does not say which of several equals comes first."""
    first = log_probs.argmax(dim=1, keepdim=True)
    best = log_probs.gather(1, first)
    if top == 1:
        return first, best.exp()
    others = log_probs.topk(top, dim=1)
    # The first stands before the others; if `topk` chose equals in its place, one of them goes.
    behind = torch.where(others.indices == first, torch.inf, others.values)
    order = behind.argsort(dim=1, descending=True, stable=True)
    ids, values = others.indices.gather(1, order), others.values.gather(1, order)
    ids[:, :1], values[:, :1] = first, best
    return ids, values.exp()


def _multiplied(tensor: Tensor, low: torch.dtype) -> Tensor:
    """Rounded to `low`. CPUs rarely multiply float16; float32 holds every one of its values."""
    rounded = tensor.to(low)
    return rounded.float() if low == torch.float16 else rounded


def parts(hidden: Tensor, matrix: Tensor) -> Iterator[slice]:
    """Rows whose logits are held at once."""
    size = max(1, CHUNK // len(matrix))
    return (slice(start, start + size) for start in range(0, len(hidden), size))
