"""Block attention as a dense boolean mask and a plain softmax: the oracle, O(M N) memory.

Letters: B batch, H query heads, G kv heads (G divides H), M queries, N keys, D head dim.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_mask(ranges: Tensor, n_keys: int) -> Tensor:
    """What each query sees: ranges [B,M,4] = (a0,a1,b0,b1) -> bool [B,M,n_keys]."""
    keys = torch.arange(n_keys, device=ranges.device)
    a0, a1, b0, b1 = ranges.unsqueeze(-2).unbind(-1)
    return ((keys >= a0) & (keys < a1)) | ((keys >= b0) & (keys < b1))


def attend(q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """softmax(scale q k^T + log mask) v in float32 or higher: [B,H,M,D], and its lse [B,H,M]."""
    batch, heads, n_queries, dim = q.shape
    kv_heads, n_keys = k.shape[1], k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    # [B,G,H/G,M,D] against [B,G,1,N,D]: the heads of a group share their keys.
    grouped = q.to(wide).reshape(batch, kv_heads, heads // kv_heads, n_queries, dim)
    scores = scale * (grouped @ k.to(wide).unsqueeze(2).mT)

    mask = dense_mask(ranges, n_keys)[:, None, None]
    # A row that sees nothing is given a harmless softmax and then zeroed: softmax over -inf alone
    # is NaN, and no NaN may appear, not even one that is masked later.
    sees_nothing = ~mask.any(-1, keepdim=True)
    weights = scores.masked_fill(~(mask | sees_nothing), float("-inf")).softmax(-1)
    weights = weights.masked_fill(sees_nothing, 0.0)
    out = weights @ v.to(wide).unsqueeze(2)
    lse = scores.detach().masked_fill(~mask, float("-inf")).logsumexp(-1)
    return out.reshape(q.shape).to(q.dtype), lse.reshape(q.shape[:3])
