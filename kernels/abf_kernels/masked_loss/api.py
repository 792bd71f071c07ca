"""`masked_loss` and `predict`: validation and explicit dispatch to a back end, no silent fallback.

Letters: R rows, d width, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from abf_kernels.masked_loss import reference, tiles

Backend = Literal["reference", "tiles", "triton"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
CHUNK = tiles.CHUNK
MOST = 8
"""Largest k: the Triton kernel keeps as many candidates a row in registers."""

MOST_ROWS = 1 << 30
"""Kernels number rows in 32 bits; addresses have 64."""


class Prediction(NamedTuple):
    """What a model says at some rows, in at least float32, without gradient."""

    nats: Tensor | None
    """[R] -log p of the target; None without targets."""
    entropy: Tensor
    """[R] nats."""
    top_ids: Tensor
    """[R,k] int64, likeliest first; of equally likely ones, the first is the one of lowest id."""
    top_probs: Tensor
    """[R,k]."""


def masked_loss(
    hidden: Tensor,
    matrix: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    backend: Backend,
    precision: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Weighted sum of -log softmax(hidden @ matrix.T)[target], and its summands.

    Args:
        hidden: [R,d] float32, bfloat16, float16 or (not on Triton) float64, rows contiguous.
        matrix: [V,d] of any of these dtypes, rows contiguous.
        target: [R] int64 or int32 in 0..V-1.
        weight: [R] floats, constants; ones by default.
        backend: "reference" (all logits, the oracle), "tiles" (CPU path, chunks of rows) or
            "triton" (CUDA, or CPU tensors in a process with TRITON_INTERPRET=1).
        precision: dtype that both are rounded to for the products; by default what they promote to.
            Softmax and sums are in float32, or float64 where the inputs are.

    Returns:
        The sum (scalar, differentiable in hidden and matrix) and the weighted nats [R] (without
        gradient), 0 for no rows.

    Raises:
        ValueError: on any input outside this contract, naming the argument.
    """
    low = _validate(hidden, matrix, target, weight, backend, precision)
    if weight is None:
        weight = hidden.new_ones(len(hidden), dtype=torch.promote_types(low, torch.float32))
    grads = torch.is_grad_enabled() and (hidden.requires_grad or matrix.requires_grad)
    # Under autocast the back ends' own products would be demoted behind their backs.
    with torch.autocast(hidden.device.type, enabled=False):
        if backend == "reference":
            return reference.loss(hidden, matrix, target.long(), weight, low)
        if backend == "tiles":
            return tiles.loss(hidden, matrix, target.long(), weight, low, grads)
        return _triton(hidden, low).loss(hidden, matrix, target, weight, low)


@torch.no_grad()
def predict(
    hidden: Tensor,
    matrix: Tensor,
    target: Tensor | None = None,
    *,
    backend: Backend,
    top: int = 1,
    precision: torch.dtype | None = None,
) -> Prediction:
    """Entropy, likeliest tokens and, with targets, their nats, of softmax(hidden @ matrix.T).

    Args:
        hidden, matrix, target, backend, precision: as for `masked_loss`.
        top: k, 1 to min(8, V).

    Raises:
        ValueError: on any input outside this contract, naming the argument.
    """
    low = _validate(hidden, matrix, target, None, backend, precision)
    if not 1 <= top <= min(MOST, len(matrix)):
        raise ValueError(f"top must lie within 1..{min(MOST, len(matrix))}; got {top}")
    with torch.autocast(hidden.device.type, enabled=False):
        picked = None if target is None else target.long()
        if backend == "reference":
            return Prediction(*reference.predict(hidden, matrix, picked, top, low))
        if backend == "tiles":
            return Prediction(*tiles.predict(hidden, matrix, picked, top, low))
        return Prediction(*_triton(hidden, low).predict(hidden, matrix, target, top, low))


def _validate(
    hidden: Tensor,
    matrix: Tensor,
    target: Tensor | None,
    weight: Tensor | None,
    backend: str,
    precision: torch.dtype | None,
) -> torch.dtype:
    """Raise ValueError, naming the argument, unless the contract is kept; the products' dtype."""
    if backend not in get_args(Backend):
        allowed = ", ".join(get_args(Backend))
        raise ValueError(f"backend must be one of {allowed}; got {backend!r}")
    for name, tensor in (("hidden", hidden), ("matrix", matrix)):
        if tensor.ndim != 2:
            raise ValueError(f"{name} must have 2 axes; got shape {tuple(tensor.shape)}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {DTYPES}; got {tensor.dtype}")
        if tensor.shape[1] == 0:
            raise ValueError(f"{name} must have a width of at least 1; got 0")
        if tensor.shape[1] > 1 and tensor.stride(1) != 1:
            raise ValueError(f"{name} must have contiguous rows; got strides {tensor.stride()}")
        if len(tensor) > MOST_ROWS:
            raise ValueError(f"{name} must have at most {MOST_ROWS} rows; got {len(tensor)}")
    (rows, width), device = hidden.shape, hidden.device
    if matrix.device != device:
        raise ValueError(f"matrix must have hidden's device {device}; got {matrix.device}")
    if matrix.shape[1] != width:
        raise ValueError(f"matrix must have hidden's width {width}; got {matrix.shape[1]}")
    if len(matrix) == 0:
        raise ValueError("matrix must have at least 1 row; got 0")
    if target is not None:
        _rows("target", target, rows, device)
        if target.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"target must be int64 or int32; got {target.dtype}")
        if rows:
            low, high = (int(bound) for bound in torch.aminmax(target))
            if low < 0 or high >= len(matrix):
                raise ValueError(
                    f"target must lie within 0..{len(matrix) - 1}, the rows of matrix; "
                    f"got {low} to {high}"
                )
    if weight is not None:
        _rows("weight", weight, rows, device)
        if weight.dtype not in DTYPES:
            raise ValueError(f"weight must be one of {DTYPES}; got {weight.dtype}")
        if weight.requires_grad:
            raise ValueError("weight must be constants: it gets no gradient")
    return _products(hidden, matrix, precision, backend)


def _rows(name: str, tensor: Tensor, rows: int, device: torch.device) -> None:
    if tensor.shape != (rows,):
        raise ValueError(f"{name} must have shape {(rows,)}; got {tuple(tensor.shape)}")
    if tensor.device != device:
        raise ValueError(f"{name} must have hidden's device {device}; got {tensor.device}")


def _products(
    hidden: Tensor, matrix: Tensor, precision: torch.dtype | None, backend: str
) -> torch.dtype:
    if precision is None:
        precision = torch.promote_types(hidden.dtype, matrix.dtype)
    elif precision not in DTYPES:
        raise ValueError(f"precision must be one of {DTYPES}; got {precision}")
    if backend == "triton" and torch.float64 in (precision, hidden.dtype, matrix.dtype):
        name = "hidden" if hidden.dtype == torch.float64 else "matrix"
        name = name if precision in (hidden.dtype, matrix.dtype) else "precision"
        raise ValueError(f"{name} must not be float64 for the triton back end")
    return precision


def _triton(hidden: Tensor, low: torch.dtype):
    """The Triton back end, if it can serve these tensors."""
    try:
        from abf_kernels.masked_loss import triton as kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError("backend 'triton' needs the package triton (envs/cuda.txt)") from error
    if hidden.device.type != "cuda" and not kernels.INTERPRETED:
        raise ValueError(
            "hidden must be on a CUDA device for the triton back end, or the process be started "
            f"with TRITON_INTERPRET=1; got {hidden.device}"
        )
    if kernels.INTERPRETED and low == torch.bfloat16:
        raise ValueError(
            "precision must not be bfloat16, nor hidden and matrix without it, where "
            "TRITON_INTERPRET is set: Triton interprets it wrongly, without saying so"
        )
    return kernels
