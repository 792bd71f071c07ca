"""`block_attention`: validation and explicit dispatch to a back end, with no silent fallback.

Letters: B batch, H query heads, G kv heads (G divides H), M queries, N keys, D head dim.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from abf_kernels.block_attention import reference, tiles

Backend = Literal["reference", "tiles"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    *,
    backend: Backend,
    scale: float | None = None,
) -> Tensor:
    """Attention where query m sees keys [a0,a1) and [b0,b1); differentiable in q, k and v.

    Args:
        q: [B,H,M,D], float32, bfloat16, float16 or float64.
        k, v: [B,G,N,D] of the same dtype and device; query head h reads kv head h // (H/G).
        ranges: int32 or int64 [B,M,4] = (a0,a1,b0,b1), half open, disjoint, within [0,N]. Either
            may be empty (start == end); a row with both empty returns 0 and has no gradient.
        backend: "reference" (dense mask, the oracle) or "tiles" (CPU path, linear memory).
        scale: factor of the scores; 1/sqrt(D) by default.

    Returns:
        [B,H,M,D] in q's dtype.

    Raises:
        ValueError: on any input outside this contract, naming the argument.

    Source: the ranges are those of the two-stream mask of BD3-LM (arXiv 2503.09573) when rows are
    sorted by (stream, document, position); see README.md.
    """
    if backend not in get_args(Backend):
        allowed = ", ".join(get_args(Backend))
        raise ValueError(f"backend must be one of {allowed}; got {backend!r}")
    validate(q, k, v, ranges)
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    elif not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale}")
    # Under autocast the back ends' own float32 products would be demoted behind their backs.
    with torch.autocast(q.device.type, enabled=False):
        if backend == "reference":
            return reference.attend(q, k, v, ranges, scale)
        return tiles.attend(q, k, v, ranges, scale)


def validate(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> None:
    """Raise ValueError, naming the argument, unless `block_attention`'s contract is kept."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must have 4 axes (batch, heads, rows, head dim); "
                f"got shape {tuple(tensor.shape)}"
            )
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {DTYPES}; got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}; got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must have q's device {q.device}; got {tensor.device}")
    batch, heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1], k.shape[2]
    if dim == 0:
        raise ValueError("q must have a head dim of at least 1; got 0")
    if k.shape[0] != batch:
        raise ValueError(f"k must have q's batch of {batch}; got {k.shape[0]}")
    if k.shape[3] != dim:
        raise ValueError(f"k must have q's head dim {dim}; got {k.shape[3]}")
    if v.shape != k.shape:
        raise ValueError(f"v must have k's shape {tuple(k.shape)}; got {tuple(v.shape)}")
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"k must have a head count that divides q's {heads}; got {kv_heads}")
    if ranges.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ranges must be int32 or int64; got {ranges.dtype}")
    if ranges.device != q.device:
        raise ValueError(f"ranges must have q's device {q.device}; got {ranges.device}")
    if ranges.shape != (batch, n_queries, 4):
        raise ValueError(
            f"ranges must have shape {(batch, n_queries, 4)} (batch, queries, 4); "
            f"got {tuple(ranges.shape)}"
        )
    if ranges.numel():
        _validate_values(ranges, n_keys)


def _validate_values(ranges: Tensor, n_keys: int) -> None:
    low, high = (int(bound) for bound in torch.aminmax(ranges))
    if low < 0 or high > n_keys:
        raise ValueError(f"ranges must lie within [0, {n_keys}], the keys; got {low} to {high}")
    a0, a1, b0, b1 = ranges.unbind(-1)
    _refuse(ranges, (a0 > a1) | (b0 > b1), "ranges must have start <= end")
    # An empty range has max(starts) >= min(ends), whatever the other is.
    _refuse(ranges, torch.maximum(a0, b0) < torch.minimum(a1, b1), "ranges must not overlap")


def _refuse(ranges: Tensor, wrong: Tensor, rule: str) -> None:
    if bool(wrong.any()):
        row, query = wrong.nonzero()[0].tolist()
        values = tuple(ranges[row, query].tolist())
        raise ValueError(f"{rule}; got (a0,a1,b0,b1) = {values} at batch row {row}, query {query}")
