"""Decoding attention request by request, key by key in order, as one softmax: the oracle.

Letters: N query rows, P new rows, H query heads, G kv heads, D head dim, S keys of a page, n cached
and m new keys of a request.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abf_kernels.block_decode.requests import Requests


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    asked: Requests,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """[N,H,D] and log-sum-exp [N,H] over the parts that are given, in float32 or higher."""
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(q.shape, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=wide, device=q.device)
    heads = torch.arange(q.shape[1], device=q.device)
    for request, (first, last) in enumerate(asked.queries.tolist()):
        rows = slice(first, last)
        found_k, found_v, visible = [], [], []
        if keys is not None and values is not None:
            at = torch.arange(int(asked.lengths[request]), device=q.device)
            page = asked.table[request, at // asked.page_size].long()
            slot = at % asked.page_size
            found_k.append(keys[page, :, slot])
            found_v.append(values[page, :, slot])
            visible.append(torch.ones(last - first, len(at), dtype=torch.bool, device=q.device))
        if k is not None and v is not None:
            start, end = asked.own[request].tolist()
            found_k.append(k[start:end])
            found_v.append(v[start:end])
            at = torch.arange(end - start, device=q.device)
            visible.append(at < asked.seen[rows, None])
        # [n+m,H,D]: every query head has its own copy.
        group = heads // (q.shape[1] // found_k[0].shape[1])
        all_k, all_v = (torch.cat(found).to(wide)[:, group] for found in (found_k, found_v))
        mask = torch.cat(visible, dim=1)[:, None]
        scores = scale * torch.einsum("mhd,nhd->mhn", q[rows].to(wide), all_k)
        scores = scores.masked_fill(~mask, -torch.inf)
        lse[rows] = scores.logsumexp(dim=-1)
        weights = (scores - lse[rows].unsqueeze(-1)).exp().masked_fill(~mask, 0.0)
        out[rows] = torch.einsum("mhn,nhd->mhd", weights, all_v)
    return out, lse
