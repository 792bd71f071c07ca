"""Decoding attention by GEMMs, one request after another: no masks but where new rows are ordered.

Letters: N query rows, P new rows, H query heads, G kv heads, R = H/G, D head dim, S keys of a page,
n cached keys, m queries and p new keys of a request.
"""

from __future__ import annotations

import torch
from torch import Tensor

from abf_kernels.block_decode.merging import merge
from abf_kernels.block_decode.requests import Requests

ROWS = 128
"""Queries at once: where new rows are ordered, a tile computes no keys behind its last query."""
SHORT = 256
"""Keys up to which they are laid side by side: fewer calls, which is most of what few keys cost."""
SCRATCH = 1 << 22
"""Scores held at once, in elements: longer histories are split over keys and merged."""

_Part = tuple[Tensor, Tensor, Tensor | None]
"""Keys and values [G,n,D], and which of them a query does not see, [m,n]; None if it sees all."""


def attend(
    q: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    keys: Tensor | None,
    values: Tensor | None,
    asked: Requests,
    scale: float,
    *,
    lse: bool,
) -> tuple[Tensor, Tensor | None]:
    """[N,H,D] and, if asked for, log-sum-exp [N,H], in float32 or higher."""
    wide = torch.promote_types(q.dtype, torch.float32)
    N, H, D = q.shape
    out = torch.zeros(N, H, D, dtype=wide, device=q.device)
    sums = torch.full((N, H), -torch.inf, dtype=wide, device=q.device) if lse else None
    given = keys if keys is not None else k
    assert given is not None
    G = given.shape[1]
    # A group's query heads share its keys: [G,R,N,D].
    grouped = (q.to(wide) * scale).view(N, G, H // G, D).permute(1, 2, 0, 3)
    answers = out.view(N, G, H // G, D).permute(1, 2, 0, 3)
    own = None if k is None or v is None else [x.to(wide).transpose(0, 1) for x in (k, v)]
    host = asked.host
    for request, (first, last) in enumerate(host.queries):
        start = host.own[request][0]
        for row in range(first, last, ROWS):
            rows = slice(row, min(row + ROWS, last))
            parts: list[_Part] = []
            if keys is not None and values is not None and host.lengths[request]:
                one, other = _history(keys, asked, request), _history(values, asked, request)
                most = max(1, SCRATCH // ((rows.stop - row) * H))
                for at in range(0, one.shape[1], most):
                    end = at + most
                    parts.append((one[:, at:end], other[:, at:end], None))
            fewest, size = min(host.seen[rows]), max(host.seen[rows])
            if own is not None and size:
                hidden = None
                if fewest < size:
                    at = torch.arange(size, device=q.device)
                    hidden = at >= asked.seen[rows, None]
                here = slice(start, start + size)
                parts.append((own[0][:, here], own[1][:, here], hidden))
            if not parts:
                continue
            asking = grouped[:, :, rows].reshape(G, -1, D)
            if len(parts) == 2 and sum(k.shape[1] for k, _, _ in parts) <= SHORT and not lse:
                found, norm = _attend_short(asking, *parts), None
            else:
                found, norm = _attend(asking, parts, lse)
            answers[:, :, rows] = found.view(G, H // G, -1, D)
            if sums is not None and norm is not None:
                sums[rows] = norm.view(H, -1).T
    return out, sums


def _history(pages: Tensor, asked: Requests, request: int) -> Tensor:
    """[G,n,D], a view where one page holds it all."""
    length, first = asked.host.lengths[request], asked.host.first_pages[request]
    if length <= asked.page_size:
        return pages[first, :, :length]
    used = asked.table[request, : -(-length // asked.page_size)]
    return pages.transpose(0, 1)[:, used.long()].flatten(1, 2)[:, :length]


def _attend_short(q: Tensor, history: _Part, own: _Part) -> Tensor:
    """[G,R*m,D]; the history, which every query sees, is not empty."""
    k = torch.cat((history[0], own[0]), dim=1).to(q.dtype)
    v = torch.cat((history[1], own[1]), dim=1).to(q.dtype)
    scores, hidden = torch.bmm(q, k.mT), own[2]
    if hidden is not None:
        late = scores.view(len(q), -1, len(hidden), k.shape[1])[..., -hidden.shape[1] :]
        late.masked_fill_(hidden, -torch.inf)
    return torch.bmm(scores.softmax(dim=2), v)


def _attend(q: Tensor, parts: list[_Part], lse: bool) -> tuple[Tensor, Tensor | None]:
    """[G,R*m,D] and log-sum-exp [G,R*m] over all parts."""
    sizes = [k.shape[1] for k, _, _ in parts]
    if len(parts) > 2 and q.shape[0] * q.shape[1] * sum(sizes) > SCRATCH:
        out, norm = _attend(q, parts[:1], True)
        for part in parts[1:]:
            assert norm is not None
            more, other = _attend(q, [part], True)
            assert other is not None
            out, norm = merge(out, norm, more, other)
        return out, norm
    each = [_scores(q, k, hidden) for k, _, hidden in parts]
    scores = each[0] if len(each) == 1 else torch.cat(each, dim=2)
    norm = scores.logsumexp(dim=2) if lse else None
    weights = scores.softmax(dim=2)
    if any(hidden is not None for _, _, hidden in parts):
        # A row that sees nothing: softmax over -inf alone is NaN.
        weights = weights.masked_fill(scores == -torch.inf, 0.0)
    each = weights.split(sizes, dim=2)
    out = torch.bmm(each[0], parts[0][1].to(q.dtype))
    for weight, (_, v, _) in zip(each[1:], parts[1:], strict=True):
        out.baddbmm_(weight, v.to(q.dtype))
    return out, norm


def _scores(q: Tensor, k: Tensor, hidden: Tensor | None) -> Tensor:
    """[G,R*m,n], -inf where a key is hidden."""
    scores = torch.bmm(q, k.to(q.dtype).mT)
    if hidden is not None:
        scores.view(q.shape[0], -1, *hidden.shape).masked_fill_(hidden, -torch.inf)
    return scores
