"""Before anything is timed: every operator against its float64 reference on the same inputs.

Letters: B batch, H query heads, G kv heads, N rows, D head dim, V vocabulary, d width.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from abf_kernels.block_attention.api import Backend, block_attention
from abf_kernels.block_attention.metadata import two_stream_ranges
from abf_kernels.block_decode.api import block_decode, decode_part, merge, requests
from abf_kernels.masked_loss.api import masked_loss, predict
from torch import Tensor

TOLERANCE = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
"""Norm of the error over norm of the result."""


class WrongResultError(Exception):
    """An operator's values are not the reference's."""


def verify(
    device: torch.device,
    dtypes: tuple[torch.dtype, ...],
    backend: Backend,
    dims: tuple[int, ...] = (64, 128),
) -> list[str]:
    """What agreed, in words; `dims` are head dims.

    Raises:
        WrongResultError: at the first result that does not; names operator, result and case.
    """
    told = []
    for dtype in dtypes:
        worst = 0.0
        with unwritten_is_nan():
            for name, actual, expected in _results(device, dtype, backend, dims):
                error = distance(actual, expected)
                # Not `error > ...`: NaN must not pass.
                if not error <= TOLERANCE[dtype]:
                    raise WrongResultError(
                        f"{name}, {dtype}: relative error {error:.3g}, allowed {TOLERANCE[dtype]}; "
                        "nothing was timed"
                    )
                worst = max(worst, error)
        kind = str(dtype).removeprefix("torch.")
        told.append(f"block_attention, block_decode, masked_loss agree in {kind}: {worst:.2g}")
    return told


@contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """What torch allocates inside and nobody writes holds NaN, so that whatever reads it shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        # Of operators of the reference that are not deterministic on a GPU; no matter here.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)  # fills such memory, too
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before, warn_only=warns)


def distance(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of what is expected."""
    wanted = expected.detach().double()
    return float((actual.detach().double() - wanted).norm() / wanted.norm().clamp(min=1e-30))


def _results(
    device: torch.device, dtype: torch.dtype, backend: Backend, dims: tuple[int, ...]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    yield from _attention(device, dtype, backend, dims)
    yield from _decoding(device, dtype, backend, dims)
    yield from _losses(device, dtype, backend)


def _sides(backend: Backend, dtype: torch.dtype) -> list[tuple[Backend, torch.dtype]]:
    return [(backend, dtype), ("reference", torch.float64)]


def _normal(*shape: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, device=device).to(dtype)


def _attention(
    device: torch.device, dtype: torch.dtype, backend: Backend, dims: tuple[int, ...]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    # Two documents and padding; blocks of one, longer than a tile, and of an odd tail.
    sizes = torch.tensor([1, 3, 150, 40, 9, 24, 30])
    block_id = torch.arange(len(sizes)).repeat_interleave(sizes)[None].to(device)
    document_id = torch.where(block_id < 3, 0, torch.where(block_id < 6, 1, -1))
    # Edited blocks: longer and shorter than their text, and some padding.
    edited = torch.tensor([2, 5, 131, 60, 1, 24, 20])
    starts = sizes.cumsum(0) - sizes
    starts[-1] = -1
    block_start = starts.repeat_interleave(edited)[None].to(device)
    for streams, begins in (("alike", None), ("of unlike lengths", block_start)):
        ranges = two_stream_ranges(
            document_id, block_id, clean_stream="context_causal", block_start=begins
        )
        for dim in dims:
            case = f"block_attention D={dim}, streams {streams}"
            yield from _attended(
                case, ranges, device, dtype, backend, dim, 4, 2 if dim == 64 else 1
            )


def _attended(
    case: str,
    ranges: Tensor,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
    dim: int,
    heads: int,
    groups: int,
) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Output, gradients and log-sum-exp of [1,H,N,D] over these ranges."""
    length = ranges.shape[1]
    inputs = [
        _normal(1, n, length, dim, device=device, dtype=dtype) for n in (heads, groups, groups)
    ]
    grad_out = _normal(1, heads, length, dim, device=device, dtype=dtype)
    results = []
    for kind, cast in _sides(backend, dtype):
        q, k, v = (x.to(cast).requires_grad_() for x in inputs)
        out, lse = block_attention(q, k, v, ranges, backend=kind, return_lse=True)
        found = (out, *torch.autograd.grad(out, (q, k, v), grad_out.to(cast)))
        results.append((*found, torch.where(lse.isneginf(), 0.0, lse)))
    for name, actual, expected in zip(("out", "dq", "dk", "dv", "lse"), *results, strict=True):
        yield f"{case}: {name}", actual, expected


def _decoding(
    device: torch.device, dtype: torch.dtype, backend: Backend, dims: tuple[int, ...]
) -> Iterator[tuple[str, Tensor, Tensor]]:
    cached, asked, page = (0, 37, 1100), (5, 1, 24), 64
    pages = [-(-n // page) for n in cached]
    table = torch.zeros(len(cached), max(pages), dtype=torch.int32)
    for request, count in enumerate(pages):
        table[request, :count] = sum(pages[:request]) + torch.arange(count).flip(0)
    ends = torch.tensor(asked).cumsum(0)
    rows = torch.stack((ends - torch.tensor(asked), ends), 1).int()
    seen = torch.tensor(asked).repeat_interleave(torch.tensor(asked)).int()
    described = requests(
        table.to(device), torch.tensor(cached, dtype=torch.int32, device=device),
        rows.to(device), rows.to(device), seen.to(device),
        page_size=page, pages=sum(pages), rows=sum(asked), own_rows=sum(asked),
    )  # fmt: skip
    for dim in dims:
        like = {"device": device, "dtype": dtype}
        q = _normal(sum(asked), 4, dim, **like)
        k, v = (_normal(sum(asked), 2, dim, **like) for _ in range(2))
        keys, values = (_normal(sum(pages), 2, page, dim, **like) for _ in range(2))
        results, sides = [], _sides(backend, dtype)
        for kind, cast in sides:
            a, b, c, d, e = (x.to(cast) for x in (q, k, v, keys, values))
            whole = block_decode(a, b, c, d, e, described, backend=kind)
            history = decode_part(a, d, e, described, part="history", backend=kind)
            own = decode_part(a, b, c, described, part="own", backend=kind)
            results.append((whole, merge(*history, *own)[0]))
        for name, actual, expected in zip(("out", "merged parts"), *results, strict=True):
            yield f"block_decode D={dim}: {name}", actual, expected


def _losses(
    device: torch.device, dtype: torch.dtype, backend: Backend
) -> Iterator[tuple[str, Tensor, Tensor]]:
    rows, vocabulary, width = 70, 515, 96
    hidden = _normal(rows, width, device=device, dtype=dtype)
    matrix = _normal(vocabulary, width, device=device, dtype=dtype) * width**-0.5
    target = torch.randint(vocabulary, (rows,), device=device)
    weight = torch.rand(rows, device=device)
    results, sides = [], _sides(backend, dtype)
    for kind, cast in sides:
        h, m = (x.to(cast).requires_grad_() for x in (hidden, matrix))
        total, nats = masked_loss(h, m, target, weight.to(cast), backend=kind)
        said = predict(h.detach(), m.detach(), target, backend=kind)
        results.append(
            (total, nats, *torch.autograd.grad(total, (h, m)), said.entropy, said.top_probs)
        )
    names = ("loss", "nats", "dhidden", "dmatrix", "entropy", "top probability")
    for name, actual, expected in zip(names, *results, strict=True):
        yield f"masked_loss: {name}", actual, expected
