"""`block_decode`, `decode_part` and `merge`: validation, explicit dispatch, no silent fallback.

Letters: N query rows and P new rows of all requests together, H query heads, G kv heads (G divides
H), D head dim, C pages, S keys of a page. `requests` describes them, once a forward pass.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from abf_kernels.block_decode import reference, tiles
from abf_kernels.block_decode.merging import merge as merge_parts
from abf_kernels.block_decode.requests import Requests, requests

__all__ = ["Backend", "Requests", "block_decode", "decode_part", "merge", "requests"]

Backend = Literal["reference", "tiles", "triton"]
Part = Literal["history", "own"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
WIDEST = 256
"""Largest head dim: a tile of keys has to fit a multiprocessor."""
MOST_HEADS = (1 << 16) - 1
"""As many as an axis of a GPU's grid has."""


def block_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor,
    values: Tensor,
    asked: Requests,
    *,
    backend: Backend,
    scale: float | None = None,
) -> Tensor:
    """Attention of each request's queries over its cached keys and its own new ones.

    Args:
        q: [N,H,D], float32, bfloat16, float16 or (not on Triton) float64, heads contiguous.
        k, v: [P,G,D], new keys and values; query head h reads kv head h // (H/G).
        keys, values: [C,G,S,D] pages.
        asked: whose rows these are; see `requests`.
        backend: "reference" (dense, the oracle), "tiles" (CPU path) or "triton" (CUDA, or CPU
            tensors in a process with TRITON_INTERPRET=1).
        scale: factor of the scores; 1/sqrt(D) by default.

    Returns:
        [N,H,D] in q's dtype, without gradient; 0 where nothing is seen and in rows of no request.

    Raises:
        ValueError: on any input outside this contract, naming the argument.
    """
    scale = _validate(q, asked, {"k": k, "v": v}, {"keys": keys, "values": values}, backend, scale)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if backend == "reference":
            return reference.attend(q, k, v, keys, values, asked, scale)[0].to(q.dtype)
        if backend == "tiles":
            return tiles.attend(q, k, v, keys, values, asked, scale, lse=False)[0].to(q.dtype)
        return _triton(q).attend(q, k, v, keys, values, asked, scale)[0]


def decode_part(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    asked: Requests,
    *,
    part: Part,
    backend: Backend,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the cached keys alone, or over the new ones alone; `merge` joins them.

    What history says to a block changes little from step to step (FlashBlock, arXiv 2602.05305): it
    may be kept, and merged with the block's own part of each step.

    Args:
        q, asked, backend, scale: as for `block_decode`.
        keys, values: pages [C,G,S,D] of part "history"; [P,G,D] new rows of part "own".
        part: which.

    Returns:
        [N,H,D] and its log-sum-exp [N,H], in at least float32; 0 and -inf where nothing is seen.
    """
    if part not in get_args(Part):
        raise ValueError(f"part must be one of {', '.join(get_args(Part))}; got {part!r}")
    given = {"keys": keys, "values": values}
    new, pages = (given, {}) if part == "own" else ({}, given)
    scale = _validate(q, asked, new, pages, backend, scale)
    both = (keys, values, None, None) if part == "own" else (None, None, keys, values)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        if backend == "reference":
            return reference.attend(q, *both, asked, scale)
        if backend == "tiles":
            out, lse = tiles.attend(q, *both, asked, scale, lse=True)
            assert lse is not None
            return out, lse
        return _triton(q).attend(q, *both, asked, scale, wide=True)


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from that over each.

    Args:
        out1, out2: [...,D] floats of one shape, dtype and device.
        lse1, lse2: [...] of that dtype; -inf where nothing is seen.

    Returns:
        out and lse of the union; 0 and -inf where neither sees anything.
    """
    for name, tensor in (("out1", out1), ("lse1", lse1), ("out2", out2), ("lse2", lse2)):
        if tensor.dtype not in DTYPES or tensor.dtype != out1.dtype:
            raise ValueError(f"{name} must have out1's dtype, a float; got {tensor.dtype}")
        if tensor.device != out1.device:
            raise ValueError(f"{name} must have out1's device {out1.device}; got {tensor.device}")
        shape = out1.shape if name.startswith("out") else out1.shape[:-1]
        if tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}; got {tuple(tensor.shape)}")
    return merge_parts(out1, lse1, out2, lse2)


def _validate(
    q: Tensor,
    asked: Requests,
    new: dict[str, Tensor],
    pages: dict[str, Tensor],
    backend: str,
    scale: float | None,
) -> float:
    """Raise ValueError, naming the argument, unless the contract is kept; the scale."""
    if backend not in get_args(Backend):
        allowed = ", ".join(get_args(Backend))
        raise ValueError(f"backend must be one of {allowed}; got {backend!r}")
    if q.ndim != 3 or len(q) != asked.rows:
        raise ValueError(
            f"q must have shape [{asked.rows} rows of asked, heads, head dim]; got {tuple(q.shape)}"
        )
    heads, dim = q.shape[1:]
    if heads > MOST_HEADS:
        raise ValueError(f"q must have at most {MOST_HEADS} heads; got {heads}")
    if not 1 <= dim <= WIDEST:
        raise ValueError(f"q must have a head dim of 1..{WIDEST}; got {dim}")
    shapes = dict.fromkeys(new, (asked.own_rows, None, dim))
    shapes |= dict.fromkeys(pages, (asked.pages, None, asked.page_size, dim))
    given = {"q": q} | new | pages
    kv_heads = None
    for name, tensor in given.items():
        if tensor.dtype not in DTYPES or tensor.dtype != q.dtype:
            raise ValueError(f"{name} must have q's dtype, one of {DTYPES}; got {tensor.dtype}")
        if backend == "triton" and tensor.dtype == torch.float64:
            raise ValueError(f"{name} must not be float64 for the triton back end")
        if tensor.device != asked.table.device:
            raise ValueError(
                f"{name} must have the device of asked, {asked.table.device}; got {tensor.device}"
            )
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient: decoding has none")
        if name != "q":
            kv_heads = tensor.shape[1] if kv_heads is None and tensor.ndim > 1 else kv_heads
            wanted = tuple(kv_heads if size is None else size for size in shapes[name])
            if tensor.shape != wanted:
                raise ValueError(
                    f"{name} must have shape {wanted} (rows or pages, kv heads, ..., head dim); "
                    f"got {tuple(tensor.shape)}"
                )
            if not kv_heads or heads % kv_heads:
                raise ValueError(
                    f"{name} must have a head count that divides q's {heads}; got {kv_heads}"
                )
        if dim > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"{name} must have contiguous heads; got strides {tensor.stride()}")
    if scale is None:
        return 1.0 / math.sqrt(dim)
    if not math.isfinite(scale):
        raise ValueError(f"scale must be finite; got {scale}")
    return scale


def _triton(q: Tensor):
    """The Triton back end, if it can serve these tensors."""
    try:
        from abf_kernels.block_decode import triton as kernels
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ValueError("backend 'triton' needs the package triton (envs/cuda.txt)") from error
    if q.device.type != "cuda" and not kernels.INTERPRETED:
        raise ValueError(
            "q must be on a CUDA device for the triton back end, or the process be started with "
            f"TRITON_INTERPRET=1; got {q.device}"
        )
    if kernels.INTERPRETED and q.dtype == torch.bfloat16:
        raise ValueError(
            "q must not be bfloat16 where TRITON_INTERPRET is set: Triton interprets it wrongly, "
            "without saying so"
        )
    return kernels
