"""Two-stream attention against dense SDPA, and its mask metadata against `create_block_mask`.

Variants are interleaved in one process on one thread, in CPU time, each round on a fresh draw of
blocks (variable blocks are new in every batch: repeating one layout would hide what a new one
costs), after a check that they agree. Ratios are the peer's over ours: above 1 we are better.
Letters: B batch, H heads, L tokens of a row (2L with its clean copy), D head dim.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from abf_kernels.block_attention import tiles
from abf_kernels.block_attention.api import block_attention, validate
from abf_kernels.block_attention.metadata import two_stream_ranges
from abf_kernels.block_attention.plan import plan_tiles
from abf_kernels.block_attention.reference import dense_mask
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.functional import scaled_dot_product_attention
from torch.profiler import ProfilerActivity, profile

from abf.hardware import bf16_instructions
from benchmarks.statistics import Row, ratio_row

SHORTEST, LONGEST = 4, 44  # block lengths are uniform between them: mean 24
CEILING = 1024
"""Side of the matrices whose product is the ceiling of what this CPU computes."""
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 6e-2}


@dataclass(frozen=True)
class Shape:
    """One problem; `length` is 2L."""

    batch: int
    heads: int
    length: int
    dim: int

    def __str__(self) -> str:
        return f"B={self.batch} H={self.heads} 2L={self.length} D={self.dim}"


LONG, SHORT, DEMO = Shape(1, 8, 4096, 64), Shape(1, 8, 1024, 64), Shape(8, 4, 1024, 32)


def draw_ids(shape: Shape, seed: int) -> tuple[Tensor, Tensor]:
    """Document and block ids [B,L]: one document a row, blocks uniform in SHORTEST..LONGEST."""
    generator = torch.Generator().manual_seed(seed)
    length = shape.length // 2
    rows = []
    for _ in range(shape.batch):
        sizes = torch.randint(SHORTEST, LONGEST + 1, (length,), generator=generator)
        rows.append(torch.repeat_interleave(torch.arange(length), sizes)[:length])
    block_id = torch.stack(rows)
    return torch.zeros_like(block_id), block_id


class Problem:
    """Inputs of one shape and dtype; `renew` draws other blocks."""

    def __init__(self, shape: Shape, dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        size = (shape.batch, shape.heads, shape.length, shape.dim)
        self.shape, self.dtype = shape, dtype
        self.q, self.k, self.v = (torch.randn(size).to(dtype).requires_grad_() for _ in range(3))
        self.grad_out = torch.randn(size).to(dtype)
        self.renew(0)

    def renew(self, seed: int) -> None:
        """Draw blocks; the dense mask is made here, outside what is timed."""
        self.ranges = two_stream_ranges(*draw_ids(self.shape, seed), clean_stream="context_causal")
        self.mask = dense_mask(self.ranges, self.shape.length)[:, None]

    def tiles(self) -> Tensor:
        """Ours."""
        return block_attention(self.q, self.k, self.v, self.ranges, backend="tiles")

    def dense(self) -> Tensor:
        """The peer."""
        return scaled_dot_product_attention(self.q, self.k, self.v, attn_mask=self.mask)

    def gradients(self, out: Tensor) -> tuple[Tensor, ...]:
        """Of q, k and v."""
        return torch.autograd.grad(out, (self.q, self.k, self.v), self.grad_out)

    def check(self) -> None:
        """Assert that values and gradients agree before anything is timed."""
        ours, peer = self.tiles(), self.dense()
        pairs = zip((ours, *self.gradients(ours)), (peer, *self.gradients(peer)), strict=True)
        for actual, expected in pairs:
            error = (actual.float() - expected.float()).abs().max() / expected.float().abs().max()
            assert error < TOLERANCE[self.dtype], f"{self.shape} {self.dtype}: {error}"

    def flops(self) -> int:
        """Of forward and backward over the pairs that are seen: seven products."""
        a0, a1, b0, b1 = self.ranges.unbind(-1)
        return 14 * int((a1 - a0 + b1 - b0).sum()) * self.shape.heads * self.shape.dim

    def waste(self) -> tuple[float, float]:
        """Share of the 2L x 2L pairs that are seen, and pairs computed per pair seen."""
        a0, a1, b0, b1 = self.ranges.unbind(-1)
        seen = int((a1 - a0 + b1 - b0).sum())
        plan = plan_tiles(self.ranges, self.shape.length, tiles.ROWS)
        computed = sum((tile.end - tile.start) * tile.columns for row in plan for tile in row)
        return seen / self.shape.batch / self.shape.length**2, computed / seen


def _cpu_seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def _attention_rows(shape: Shape, dtype: torch.dtype, rounds: int) -> list[Row]:
    problem = Problem(shape, dtype)
    problem.check()
    variants = {"dense": problem.dense, "tiles": problem.tiles}
    forward: dict[str, list[float]] = {name: [] for name in variants}
    both: dict[str, list[float]] = {name: [] for name in variants}
    product, needed = [], []
    square = torch.randn(2, CEILING, CEILING).to(dtype)
    for number in range(-2, rounds):
        problem.renew(number + 3)
        ceiling = _cpu_seconds(lambda: square[0] @ square[1])
        if number >= 0:
            product.append(ceiling)
            needed.append(problem.flops() * ceiling / (2 * CEILING**3))
        for name, attend in variants.items():
            with torch.no_grad():
                ahead = _cpu_seconds(attend)
            there_and_back = _cpu_seconds(lambda attend=attend: problem.gradients(attend()))
            if number >= 0:  # the first rounds compile GEMMs and touch memory
                forward[name].append(ahead)
                both[name].append(there_and_back)
    density, waste = problem.waste()
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    rows = []
    for step, seconds in (("forward", forward), ("forward+backward", both)):
        ours, peer = (1e3 * sorted(seconds[name])[rounds // 2] for name in ("tiles", "dense"))
        detail = (
            f"tiles {ours:.1f} ms, dense SDPA with a boolean mask {peer:.1f} ms; density "
            f"{density:.3f}, tile waste {waste:.2f}; {rounds} rounds, 1 thread"
        )
        rows.append(
            ratio_row(f"{step}, {kind}, {shape}", seconds["dense"], seconds["tiles"], detail)
        )
    rate = 2 * CEILING**3 / sorted(product)[rounds // 2] / 1e9
    detail = (
        f"of the rate of a product of {CEILING} x {CEILING} matrices in the same rounds, "
        f"{rate:.0f} GFLOP/s; counted are seven products of D multiply-adds for each pair seen"
    )
    name = f"share of matrix-product rate, forward+backward, {kind}, {shape}"
    return [*rows, ratio_row(name, needed, both["tiles"], detail)]


def _memory_rows(shape: Shape, dtype: torch.dtype) -> list[Row]:
    """Peak bytes that a training step of attention allocates, mask or ranges included: all of them,
    and what is beyond the output and the three gradients, which any implementation must hold.
    """
    problem = Problem(shape, dtype)
    ids = draw_ids(shape, 1)

    def ours() -> None:
        problem.ranges = two_stream_ranges(*ids, clean_stream="context_causal")
        problem.gradients(problem.tiles())

    def peer() -> None:
        problem.mask = dense_mask(problem.ranges, shape.length)[:, None]
        problem.gradients(problem.dense())

    peaks = []
    for call in (peer, ours):
        call()
        peaks.append(_peak_bytes(call))
    kind = {torch.float32: "fp32", torch.bfloat16: "bf16"}[dtype]
    due = 4 * problem.q.nbytes
    rows = []
    for what, away, detail in (
        ("peak memory", 0, "output and gradients included"),
        ("memory beyond output and gradients", due, "mask included; goal 4 times at 2L=4096"),
    ):
        dense, tiled = (peak - away for peak in peaks)
        rows.append(
            ratio_row(
                f"{what}, {kind}, {shape}",
                [dense],
                [tiled],
                f"tiles {tiled / 2**20:.1f} MiB, dense {dense / 2**20:.1f} MiB, {detail}",
            )
        )
    return rows


def _peak_bytes(call: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    recorder: Any = profiler.profiler
    changes = [event for event in recorder.kineto_results.events() if event.name() == "[memory]"]
    held = peak = 0
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _metadata_rows(rounds: int) -> list[Row]:
    length, half = LONG.length, LONG.length // 2
    position = torch.arange(length)
    is_clean = position >= half
    queries = torch.empty(1, 1, length, 1)
    seconds: dict[str, list[float]] = {"peer": [], "ranges": [], "plan": []}
    for number in range(-1, rounds):
        document_id, block_id = draw_ids(LONG, number + 1)
        document, block = document_id[0].repeat(2), block_id[0].repeat(2)

        def sees(b: Tensor, h: Tensor, q: Tensor, k: Tensor, document=document, block=block):
            own = ~is_clean[q] & ~is_clean[k] & (block[q] == block[k])
            before = ~is_clean[q] & is_clean[k] & (block[k] < block[q])
            causal = is_clean[q] & is_clean[k] & (k <= q)
            return (document[q] == document[k]) & (own | before | causal)

        def peer(sees=sees):
            return create_block_mask(sees, 1, None, length, length, device="cpu")

        def ours(document_id=document_id, block_id=block_id) -> Tensor:
            return two_stream_ranges(document_id, block_id, clean_stream="context_causal")

        def planned(ours=ours) -> object:
            ranges = ours()
            validate(queries, queries, queries, ranges)
            return plan_tiles(ranges, length, tiles.ROWS)

        for name, call in (("peer", peer), ("ranges", ours), ("plan", planned)):
            # Ours is near the clock's resolution: the mean of twenty, after one that finds its
            # memory again behind the peer's hundreds of megabytes.
            repeats = 1 if name == "peer" else 20
            if name != "peer":
                call()
            taken = sum(_cpu_seconds(call) for _ in range(repeats)) / repeats
            if number >= 0:
                seconds[name].append(taken)
    rows = []
    for name, what in (
        ("ranges", "ranges (goal 500)"),
        ("plan", "ranges, validation and tile plan"),
    ):
        tiledms, peer_ms = (1e3 * sorted(seconds[n])[rounds // 2] for n in (name, "peer"))
        detail = f"ours {tiledms:.3f} ms, create_block_mask {peer_ms:.1f} ms, B=1, 1 thread"
        rows.append(
            ratio_row(f"mask metadata: {what}, 2L={length}", seconds["peer"], seconds[name], detail)
        )
    return rows


@contextmanager
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def run(quick: bool = False) -> list[Row]:
    """Rows of the benchmark table; bfloat16 only where the CPU multiplies it."""
    dtypes = [torch.float32] + [torch.bfloat16] * bool(bf16_instructions())
    rows: list[Row] = []
    with _one_thread():
        for dtype in dtypes:
            for shape in (SHORT, DEMO) if quick else (SHORT, LONG, DEMO):
                rows += _attention_rows(shape, dtype, rounds=7 if quick else 9)
            rows += _memory_rows(SHORT if quick else LONG, dtype)
        rows += _metadata_rows(rounds=7 if quick else 11)
    return rows


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main()
