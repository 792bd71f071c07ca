"""Cross-entropy through the vocabulary head without holding all logits.

Letters: R rows, d width, V vocabulary. Rows go through the head in chunks; where gradients are
wanted they are computed in the same pass (each row's weight is known beforehand), so no logits are
kept and none are computed twice. Same idea as Liger's fused linear cross-entropy (arXiv
2410.10989).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

CHUNK = 1 << 25
"""Logits held at once, in elements (128 MiB in fp32)."""


def head_nll(
    states: Tensor, matrix: Tensor, target: Tensor, weight: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Weighted sum of -log softmax(states @ matrix.T)[target], and its summands.

    The products run in autocast's dtype where it is on; softmax and sums in at least fp32.

    Args:
        states: [R, d].
        matrix: [V, d].
        target: [R] int64 in 0..V-1.
        weight: [R], constants; ones by default.

    Returns:
        The sum (scalar, differentiable in states and matrix) and the weighted nats [R] (without
        gradient).
    """
    if weight is None:
        weight = states.new_ones(len(states))
    grads = torch.is_grad_enabled() and (states.requires_grad or matrix.requires_grad)
    device = states.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    total, nll = _HeadNll.apply(states, matrix, target, weight, low, grads)
    return total, nll


class _HeadNll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        matrix: Tensor,
        target: Tensor,
        weight: Tensor,
        low: torch.dtype,
        grads: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(states.dtype, torch.float32)
        nll = torch.empty(len(states), dtype=wide, device=states.device)
        grad_states = torch.empty_like(states) if grads else None
        grad_matrix = torch.zeros_like(matrix) if grads else None
        with torch.autocast(states.device.type, enabled=False):
            low_states, low_matrix = states.to(low), matrix.to(low)
            size = max(1, CHUNK // len(matrix))
            for start in range(0, len(states), size):
                part = slice(start, start + size)
                # One pass converts to fp32 and normalises.
                log_probs = (low_states[part] @ low_matrix.T).log_softmax(dim=1, dtype=wide)
                picked = target[part, None]
                nll[part] = -log_probs.gather(1, picked)[:, 0]
                if grad_states is None or grad_matrix is None:
                    continue
                # d nll / d logits = softmax - one-hot, written over the log-probabilities.
                slope = log_probs.exp_()
                slope.scatter_add_(1, picked, slope.new_full(picked.shape, -1.0))
                slope = slope.mul_(weight[part, None].to(wide)).to(low)
                grad_states[part] = slope @ low_matrix
                grad_matrix += slope.T @ low_states[part]
            nll.mul_(weight)
        if grads:
            ctx.save_for_backward(grad_states, grad_matrix)
        ctx.mark_non_differentiable(nll)
        return nll.sum(), nll

    @staticmethod
    @once_differentiable  # untyped in torch, hence:
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grad_outputs: Tensor
    ) -> tuple[Tensor | None, ...]:
        grad_states, grad_matrix = ctx.saved_tensors
        grad_total = grad_outputs[0]
        return grad_states * grad_total, grad_matrix * grad_total, None, None, None, None
