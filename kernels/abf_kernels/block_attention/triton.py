"""The `triton` back end: what is launched, with which tiles, and what the backward pass keeps.

Letters: B batch, H query heads, G kv heads, R = H/G, M queries, N keys, D head dim. Beside it:
`triton_kernels.py`, `triton_plan.py` (bounds of tiles), `configs.py` (tile sizes).
"""
# Triton's own types make no sense of what kernels are called with.
# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false

from __future__ import annotations

import math
from typing import Any, cast

import torch
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from abf_kernels.block_attention.configs import Config, choose
from abf_kernels.block_attention.memo import Memo
from abf_kernels.block_attention.triton_kernels import dkv_kernel, dq_kernel, forward_kernel
from abf_kernels.block_attention.triton_plan import DevicePlan

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
DIMS = (64, 128)  # smaller heads are filled up with zeros
FAR = 1 << 24  # elements from row to row: the last of a tile's 128 still has a 32-bit offset

_plans: Memo[DevicePlan] = Memo()
_INTERPRETED = not isinstance(forward_kernel, triton.JITFunction)


def refuse(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise ValueError where this back end cannot compute what the others can."""
    if q.dtype not in DTYPES:
        raise ValueError(f"q must be one of {DTYPES} for backend triton; got {q.dtype}")
    if q.shape[-1] > DIMS[-1]:
        raise ValueError(
            f"q must have a head dim of at most {DIMS[-1]} for backend triton; got {q.shape[-1]}"
        )
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(2) > FAR and tensor.shape[2] > 1:
            raise ValueError(
                f"{name} must have rows at most {FAR} elements apart for backend triton (call "
                f".contiguous()); got {tensor.stride(2)}"
            )
    if _INTERPRETED:
        if q.device.type != "cpu" or q.dtype == torch.bfloat16:
            raise ValueError(
                "q must be float32 or float16 on the CPU where TRITON_INTERPRET is set (Triton "
                f"interprets bfloat16 wrongly, without saying so); got {q.dtype} on {q.device}"
            )
    elif q.device.type != "cuda":
        raise ValueError(
            "q must be on a CUDA device for backend triton (or set TRITON_INTERPRET=1 before it is "
            f"imported: slow, for tests); got {q.device}"
        )


def attend(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + log mask) v [B,H,M,D] in q's dtype, and the float32 lse [B,H,M]."""
    if scale < 0:
        q, scale = -q, -scale  # exact; the kernels scale after taking the maximum
    dim = q.shape[-1]
    fill = next(size for size in DIMS if size >= dim) - dim
    if fill:
        q, k, v = (F.pad(x, (0, fill)) for x in (q, k, v))
    plan = _plans.get(ranges, k.shape[2], lambda: DevicePlan(ranges, k.shape[2]))
    out, lse = cast("tuple[Tensor, Tensor]", _TritonAttention.apply(q, k, v, plan, scale))
    return out[..., :dim], lse


class _TritonAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: DevicePlan, scale: float
    ) -> tuple[Tensor, Tensor]:
        batch, heads, n_queries, dim = q.shape
        config = config_of(q)
        out = torch.empty_like(q)
        lse = torch.empty(batch, heads, n_queries, dtype=torch.float32, device=q.device)
        # delta = grad_out . out cancels against dP: where one key takes nearly all the weight, the
        # rounding of `out` is larger than the gradient. So what it lost is kept as well.
        keep = q.dtype != torch.float32 and any(ctx.needs_input_grad)
        rest = torch.empty_like(out) if keep else out
        rows, keys, num_warps, num_stages = config.forward
        tiles = triton.cdiv(n_queries, rows)
        if lse.numel():
            forward_kernel[(batch * heads * tiles,)](
                q, k, v, out, rest, lse, plan.ranges, plan.bounds(rows), scale * math.log2(math.e),
                *_strides(q, k, v, out), heads, heads // k.shape[1], n_queries, k.shape[2], tiles,
                D=dim, ROWS=rows, KEYS=keys, KEEP=keep, PRECISION=_precision(q),
                num_warps=num_warps, num_stages=num_stages,
            )  # fmt: skip
        # The ranges are saved so that writing to them in between is an error.
        ctx.save_for_backward(q, k, v, out, rest, lse, plan.ranges)
        ctx.plan, ctx.scale, ctx.keep = plan, scale, keep
        natural = lse * math.log(2)
        ctx.mark_non_differentiable(natural)
        return out, natural

    @staticmethod
    @once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, grad_out: Tensor, _: Tensor
    ) -> tuple[Tensor | None, ...]:
        q, k, v, out, rest, lse, _ = ctx.saved_tensors
        plan: DevicePlan = ctx.plan
        batch, heads, n_queries, dim = q.shape
        groups, n_keys = k.shape[1:3]
        if grad_out.stride(-1) != 1 or grad_out.stride(2) > FAR:  # that of a sum has stride 0
            grad_out = grad_out.contiguous()
        config, precision = config_of(q), _precision(q)
        log2_scale = ctx.scale * math.log2(math.e)
        delta = torch.empty_like(lse)
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        counts = heads, heads // groups, n_queries, n_keys
        if not (lse.numel() and k.numel()):
            return dq.zero_(), dk.zero_(), dv.zero_(), None, None

        rows, keys, num_warps, num_stages = config.dq
        tiles = triton.cdiv(n_queries, rows)
        dq_kernel[(batch * heads * tiles,)](
            q, k, v, out, rest, grad_out, lse, plan.ranges, plan.bounds(rows), delta, dq,
            log2_scale, ctx.scale, *_strides(q, k, v, out, grad_out, dq), *counts, tiles,
            D=dim, ROWS=rows, KEYS=keys, KEEP=ctx.keep, PRECISION=precision,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        rows, keys, num_warps, num_stages = config.dkv
        listed = plan.touching(rows, keys)
        tiles = triton.cdiv(n_keys, keys)
        dkv_kernel[(batch * groups * tiles,)](
            q, k, v, grad_out, lse, delta, plan.ranges, listed.entries, listed.counts, dk, dv,
            log2_scale, ctx.scale, *_strides(q, k, v, grad_out, dk, dv), *counts, tiles,
            listed.entries.shape[2], D=dim, ROWS=rows, KEYS=keys, PRECISION=precision,
            num_warps=num_warps, num_stages=num_stages,
        )  # fmt: skip
        return dq, dk, dv, None, None


def config_of(q: Tensor) -> Config:
    """Tiles for queries [...,D] on their device."""
    capability = None if _INTERPRETED else torch.cuda.get_device_capability(q.device)
    return choose(capability, q.shape[-1], q.element_size())


def _precision(q: Tensor) -> str:
    """float32 as exact as it was asked for, by three products of tf32; narrower types have one."""
    return "tf32x3" if q.dtype == torch.float32 else "tf32"


def _strides(*tensors: Tensor) -> list[int]:
    """Strides of all but the last axis, which is contiguous."""
    return [stride for x in tensors for stride in x.stride()[:3]]
