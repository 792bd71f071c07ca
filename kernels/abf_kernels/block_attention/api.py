"""`block_attention`: validation and explicit dispatch to a back end, with no silent fallback.

Letters: B batch, H query heads, G kv heads (G divides H), M queries, N keys, D head dim.
"""

from __future__ import annotations

import math
from typing import Literal, get_args, overload

import torch
from torch import Tensor

from abf_kernels.block_attention import reference, tiles
from abf_kernels.block_attention.memo import Memo

Backend = Literal["reference", "tiles", "triton"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MOST_ROWS = 1 << 30
"""Queries or keys are numbered in 32 bits; addresses have 64."""
_validated: Memo[None] = Memo()


@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    *,
    backend: Backend,
    scale: float | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    *,
    backend: Backend,
    scale: float | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def block_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    ranges: Tensor,
    *,
    backend: Backend,
    scale: float | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention where query m sees keys [a0,a1) and [b0,b1); differentiable in q, k and v.

    Args:
        q: [B,H,M,D], float32, bfloat16, float16 or float64; its last axis has stride 1.
        k, v: [B,G,N,D] of the same dtype and device, last axis alike; query head h reads kv head
            h // (H/G).
        ranges: int32 or int64 [B,M,4] = (a0,a1,b0,b1), half open, disjoint, within [0,N]. Either
            may be empty (start == end); a row with both empty returns 0 and has no gradient.
        backend: "reference" (dense mask, the oracle), "tiles" (CPU path, linear memory) or "triton"
            (NVIDIA GPUs; D up to 128, no float64; on a CPU under Triton's interpreter, for tests).
        scale: factor of the scores; 1/sqrt(D) by default.
        return_lse: also return log sum_n exp(scale q k_n) over the keys that each query sees.

    The same input gives the same bits, forward and backward, on every back end (on a CPU with as
    many threads; the reference's products on a GPU as `torch.use_deterministic_algorithms` has
    it): nothing is added in an order that varies, so there is no slower mode to ask for.

    Returns:
        [B,H,M,D] in q's dtype; with `return_lse` also [B,H,M] in float32 (float64 of float64), -inf
        where nothing is seen, without a gradient.

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
        if backend == "triton":
            # Imported only here: CPU environments may have no Triton.
            from abf_kernels.block_attention import triton

            triton.refuse(q, k, v)
            out, lse = triton.attend(q, k, v, ranges, scale)
        elif backend == "tiles":
            tiles.refuse(k)
            out, lse = tiles.attend(q, k, v, ranges, scale)
        else:
            out, lse = reference.attend(q, k, v, ranges, scale)
    return (out, lse) if return_lse else out


def validate(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor) -> None:
    """Raise ValueError, naming the argument, unless `block_attention`'s contract is kept."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.ndim != 4:
            raise ValueError(
                f"{name} must have 4 axes (batch, heads, rows, head dim); "
                f"got shape {tuple(tensor.shape)}"
            )
        if tensor.shape[2] > MOST_ROWS:
            raise ValueError(f"{name} must have at most {MOST_ROWS} rows; got {tensor.shape[2]}")
        if tensor.dtype not in DTYPES:
            raise ValueError(f"{name} must be one of {DTYPES}; got {tensor.dtype}")
        if tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype {q.dtype}; got {tensor.dtype}")
        if tensor.device != q.device:
            raise ValueError(f"{name} must have q's device {q.device}; got {tensor.device}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} must have stride 1 in its last axis (call .contiguous()); "
                f"got {tensor.stride(-1)}"
            )
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
        _validated.get(ranges, n_keys, lambda: _validate_values(ranges, n_keys))


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
