"""Cross-entropy through the vocabulary head without holding all logits.

Letters: R rows, d width, V vocabulary, T tokens looked up a row. Rows go through the head in
chunks. `head_nll`: where gradients are wanted they are computed in the same pass (each row's weight
is known beforehand), so no logits are kept and none are computed twice. Same idea as Liger's fused
linear cross-entropy (arXiv 2410.10989).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from abf.diffusion.flops import count, products

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
    count(products(len(states), matrix.numel()))
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
            for part in _parts(states, matrix):
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


def head_reads(
    states: Tensor, matrix: Tensor, tokens: Tensor, *, mix: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of some tokens a row, and how low the vocabulary lies at worst.

    With p = softmax(states @ matrix.T): log p of `tokens`, and mean over the vocabulary of
    log((1-mix) p + mix/V). Both are differentiable; logits are computed again for the gradient, so
    that whatever is made of these numbers needs no formula here.

    Args:
        states: [R, d].
        matrix: [V, d].
        tokens: [R, T] int64 in 0..V-1.
        mix: share of a uniform distribution; 0 leaves the mean out (zeros).

    Returns:
        [R, T] and [R], nats in at least fp32.
    """
    device = states.device.type
    low = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype
    count(products(len(states), matrix.numel()))
    return _HeadReads.apply(states, matrix, tokens, mix, low)


class _HeadReads(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, states: Tensor, matrix: Tensor, tokens: Tensor, mix: float, low: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        wide = torch.promote_types(states.dtype, torch.float32)
        found = torch.empty(tokens.shape, dtype=wide, device=states.device)
        floor = torch.zeros(len(states), dtype=wide, device=states.device)
        with torch.autocast(states.device.type, enabled=False):
            matrix_low = matrix.to(low)
            for part in _parts(states, matrix):
                log_probs = (states[part].to(low) @ matrix_low.T).log_softmax(dim=1, dtype=wide)
                found[part] = log_probs.gather(1, tokens[part])
                if mix:
                    mixed = log_probs.exp_().mul_(1 - mix).add_(mix / len(matrix))
                    floor[part] = mixed.log_().mean(dim=1)
        ctx.save_for_backward(states, matrix, tokens)
        ctx.mix, ctx.low = mix, low
        return found, floor

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, *grads: Tensor
    ) -> tuple[Tensor | None, ...]:
        states, matrix, tokens = ctx.saved_tensors
        grad_found, grad_floor = grads
        grad_states, grad_matrix = torch.empty_like(states), torch.zeros_like(matrix)
        with torch.autocast(states.device.type, enabled=False):
            matrix_low = matrix.to(ctx.low)
            for part in _parts(states, matrix):
                low = states[part].to(ctx.low)
                probs = (low @ matrix_low.T).softmax(dim=1, dtype=grad_found.dtype)
                # d log p(v) / d logits = one-hot(v) - p, summed over what came from above.
                slope = probs * -grad_found[part].sum(dim=1, keepdim=True)
                slope.scatter_add_(1, tokens[part], grad_found[part])
                if ctx.mix:
                    mixed = (1 - ctx.mix) * probs
                    ratio = mixed / (mixed + ctx.mix / len(matrix))
                    pull = ratio - probs * ratio.sum(dim=1, keepdim=True)
                    slope += pull * (grad_floor[part, None] / len(matrix))
                slope = slope.to(ctx.low)
                grad_states[part] = slope @ matrix_low
                grad_matrix += slope.T @ low
        return grad_states, grad_matrix, None, None, None


def _parts(states: Tensor, matrix: Tensor) -> Iterator[slice]:
    """Rows whose logits are held at once."""
    size = max(1, CHUNK // len(matrix))
    return (slice(start, start + size) for start in range(0, len(states), size))
