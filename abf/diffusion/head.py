"""Cross-entropy through the vocabulary head without holding all logits: the seam to `masked_loss`,
and log-probabilities of several tokens a row.

Letters: R rows, d width, V vocabulary, T tokens looked up a row.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from abf_kernels.masked_loss.api import CHUNK, Backend, Prediction, masked_loss, predict
from torch import Tensor
from torch.autograd.function import once_differentiable

from abf.diffusion.flops import count, products


def head_nll(
    states: Tensor,
    matrix: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    backend: Backend,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of -log softmax(states @ matrix.T)[target], and its summands.

    The products run in autocast's dtype where it is on; softmax and sums in at least fp32.

    Args:
        states: [R, d].
        matrix: [V, d].
        target: [R] int64 in 0..V-1.
        weight: [R], constants; ones by default.
        backend: back end of `abf_kernels.masked_loss`.

    Returns:
        The sum (scalar, differentiable in states and matrix) and the weighted nats [R] (without
        gradient).
    """
    count(products(len(states), matrix.numel()))
    low = _precision(states)
    return masked_loss(states, matrix, target, weight, backend=backend, precision=low)


def head_likeliest(states: Tensor, matrix: Tensor, *, top: int, backend: Backend) -> Prediction:
    """Entropy and the `top` likeliest tokens of softmax(states @ matrix.T), without gradient.

    Args:
        states: [R, d].
        matrix: [V, d]; see `multiplied`.
        top: at most 8.
        backend: back end of `abf_kernels.masked_loss`.
    """
    count(products(len(states), matrix.numel()))
    return predict(states, matrix, top=top, backend=backend, precision=_precision(states))


def multiplied(matrix: Tensor) -> Tensor:
    """The matrix as the products take it: who multiplies often rounds it once, not every time."""
    return matrix.to(_precision(matrix))


def _precision(states: Tensor) -> torch.dtype:
    device = states.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else states.dtype


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
    count(products(len(states), matrix.numel()))
    return _HeadReads.apply(states, matrix, tokens, mix, _precision(states))


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
            least = floor.new_tensor(mix / len(matrix))
            for part in _parts(states, matrix):
                log_probs = (states[part].to(low) @ matrix_low.T).log_softmax(dim=1, dtype=wide)
                found[part] = log_probs.gather(1, tokens[part])
                if mix:
                    probs = log_probs.exp_()
                    mixed = torch.add(least, probs, alpha=1 - mix, out=probs)
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
                given = grad_found[part]
                lost = given.sum(dim=1, keepdim=True)
                if ctx.mix:
                    # As few passes and temporaries as there can be: there are V numbers a row.
                    mixed = probs + ctx.mix / (1 - ctx.mix) / len(matrix)
                    ratio = torch.div(probs, mixed, out=mixed)
                    pull = grad_floor[part, None] / len(matrix)
                    lost = lost + ratio.sum(dim=1, keepdim=True) * pull
                    slope = ratio.mul_(pull).addcmul_(probs, lost, value=-1)
                else:
                    slope = probs.mul_(-lost)
                slope.scatter_add_(1, tokens[part], given)
                slope = slope.to(ctx.low)
                grad_states[part] = slope @ matrix_low
                grad_matrix += slope.T @ low
        return grad_states, grad_matrix, None, None, None


def _parts(states: Tensor, matrix: Tensor) -> Iterator[slice]:
    """Rows whose logits are held at once."""
    size = max(1, CHUNK // len(matrix))
    return (slice(start, start + size) for start in range(0, len(states), size))
