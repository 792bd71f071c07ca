"""Decoding attention as a share of copy bandwidth, and the loss beside materialised logits.

Letters: B requests, H query heads, G kv heads, D head dim, R rows, d width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from abf_kernels.block_decode.api import Backend, Requests, block_decode, requests
from abf_kernels.masked_loss.api import masked_loss
from torch import Tensor
from torch.nn.functional import cross_entropy, linear, scaled_dot_product_attention

from benchmarks.gpu.ceilings import copy_seconds
from benchmarks.gpu.timing import Call, Clock, Figure, figure, interleaved, ratio

PAGE = 256


@dataclass(frozen=True)
class Cache:
    """Requests with as many cached keys each, and a block of `own` new tokens."""

    requests: int
    cached: int
    own: int = 32
    heads: int = 32
    groups: int = 8
    dim: int = 128

    def __str__(self) -> str:
        return (
            f"B={self.requests} keys={self.cached} block={self.own} H={self.heads} "
            f"G={self.groups} D={self.dim}"
        )


CACHES = (Cache(1, 131_072), Cache(1, 32_768), Cache(1, 131_072, own=1), Cache(32, 4096))


@dataclass(frozen=True)
class Decoding:
    """Inputs of one case on the device."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    asked: Requests

    def ours(self, backend: Backend) -> Callable[[], Tensor]:
        """The kernel of this project."""
        given = self.q, self.k, self.v, self.keys, self.values, self.asked
        return lambda: block_decode(*given, backend=backend)


def prepared(case: Cache, device: torch.device, dtype: torch.dtype) -> Decoding:
    """Random keys in pages that lie in a row."""
    n, pages = case.requests, -(-case.cached // PAGE)
    table = torch.arange(n * pages, dtype=torch.int32, device=device).view(n, pages)
    ends = torch.arange(1, n + 1, dtype=torch.int32, device=device) * case.own
    rows = torch.stack((ends - case.own, ends), 1)
    asked = requests(
        table, torch.full((n,), case.cached, dtype=torch.int32, device=device), rows, rows,
        torch.full((n * case.own,), case.own, dtype=torch.int32, device=device),
        page_size=PAGE, pages=n * pages, rows=n * case.own, own_rows=n * case.own,
    )  # fmt: skip

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    q = normal(n * case.own, case.heads, case.dim)
    k, v = (normal(n * case.own, case.groups, case.dim) for _ in range(2))
    keys, values = (normal(n * pages, case.groups, PAGE, case.dim) for _ in range(2))
    return Decoding(q, k, v, keys, values, asked)


def decoding(
    case: Cache,
    device: torch.device,
    clock: Clock,
    *,
    rounds: int,
    backend: Backend = "triton",
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Figure]:
    """Bandwidth at which cached keys and values are read, over that of a copy in the same run."""
    given, n, pages = prepared(case, device, dtype), case.requests, -(-case.cached // PAGE)
    past_k, past_v = (
        x.view(n, pages, case.groups, PAGE, case.dim).transpose(1, 2).reshape(
            n, case.groups, pages * PAGE, case.dim
        )[:, :, : case.cached]
        for x in (given.keys, given.values)
    )  # fmt: skip
    of_sdpa = given.q.view(n, case.own, case.heads, case.dim).transpose(1, 2)

    def sdpa() -> object:
        # Cached keys alone, and already in a row: the peer has less to do.
        return scaled_dot_product_attention(
            of_sdpa, past_k, past_v, enable_gqa=case.heads != case.groups
        )

    seconds = interleaved({"ours": given.ours(backend), "SDPA": sdpa}, clock, rounds=rounds)
    moved = 2 * n * case.cached * case.groups * case.dim * given.keys.element_size()
    copied = copy_seconds(moved // 2, device, clock, rounds)
    share = [c / s for c, s in zip(copied, seconds["ours"], strict=True)]
    goal = ">= 0.7" if n == 1 else ""
    detail = f"{moved / sorted(seconds['ours'])[rounds // 2] / 1e9:.0f} GB/s"
    yield figure(
        f"decode, share of copy bandwidth, {case}", share, "share", goal=goal, detail=detail
    )
    yield ratio(f"decode, ours over SDPA, {case}", seconds["SDPA"], seconds["ours"])


LOSSES = ((8192, 576, 49_152), (8192, 2048, 151_936))
"""R, d, V: SmolLM2-135M, and a Qwen of width 2048."""


def loss_calls(
    rows: int,
    width: int,
    vocabulary: int,
    device: torch.device,
    dtype: torch.dtype,
    backend: Backend,
) -> dict[str, Callable[[], Sequence[Tensor]]]:
    """Gradients of the loss, by this project's kernel and by materialised logits."""
    hidden = torch.randn(rows, width, device=device).to(dtype).requires_grad_()
    matrix = (torch.randn(vocabulary, width, device=device) * width**-0.5).to(dtype)
    matrix.requires_grad_()
    target = torch.randint(vocabulary, (rows,), device=device)

    def ours() -> Sequence[Tensor]:
        total, _ = masked_loss(hidden, matrix, target, backend=backend)
        return torch.autograd.grad(total, (hidden, matrix))

    def logits() -> Sequence[Tensor]:
        total = cross_entropy(linear(hidden, matrix).float(), target, reduction="sum")
        return torch.autograd.grad(total, (hidden, matrix))

    return {"ours": ours, "logits": logits}


def losses(
    rows: int,
    width: int,
    vocabulary: int,
    device: torch.device,
    clock: Clock,
    *,
    rounds: int,
    backend: Backend = "triton",
    dtype: torch.dtype = torch.bfloat16,
    peak: Callable[[Call], float] | None = None,
) -> Iterator[Figure]:
    """Forward and backward of the loss, in time and (given `peak`) in the memory it takes."""
    calls = loss_calls(rows, width, vocabulary, device, dtype, backend)
    seconds = interleaved(calls, clock, rounds=rounds)
    case = f"R={rows} d={width} V={vocabulary}"
    rates = [6 * rows * width * vocabulary / s / 1e12 for s in seconds["ours"]]
    yield figure(f"loss, forward+backward, {case}", rates, "TFLOP/s")
    yield ratio(f"loss, ours over logits, {case}", seconds["logits"], seconds["ours"])
    if peak is not None:
        held = {name: peak(call) for name, call in calls.items()}
        share = held["logits"] / held["ours"]
        detail = f"ours {held['ours'] / 2**20:.0f} MiB, logits {held['logits'] / 2**20:.0f} MiB"
        yield Figure(
            f"loss, memory, ours over logits, {case}", share, share, share, "ratio", detail=detail
        )


def cuda_peak(call: Call) -> float:
    """Bytes that a call holds at most, beyond what stood before it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
