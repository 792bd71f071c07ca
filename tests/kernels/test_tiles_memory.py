"""What the tiles of block attention hold while gradients are computed."""

from __future__ import annotations

import pytest
import torch
from abf_kernels.block_attention import tiles
from abf_kernels.block_attention.api import block_attention
from abf_kernels.block_attention.metadata import two_stream_ranges
from torch import Tensor

from benchmarks.allocations import Allocations
from tests.kernels.dense import dense_attention

LENGTH, DIM = 256, 16


def problem(heads: int, kv_heads: int, rows: int = 1) -> tuple[list[Tensor], Tensor]:
    """q, k, v and a gradient, and ranges of blocks of 24 in two streams."""
    block_id = (torch.arange(LENGTH) // 24).expand(rows, -1).contiguous()
    ranges = two_stream_ranges(torch.zeros_like(block_id), block_id, clean_stream="context_causal")
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, n, 2 * LENGTH, DIM) for n in (heads, kv_heads, kv_heads, heads)]
    return [torch.randn(s, generator=generator).requires_grad_() for s in shapes], ranges


def test_wide_key_gradients_are_of_few_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond output and gradients, each further head costs a few numbers a query and no more."""
    monkeypatch.setattr(tiles, "SCRATCH", 1 << 12)
    beyond = {}
    for heads in (2, 8):
        leaves, ranges = problem(heads, heads)
        q, k, v, grad = (x.detach().bfloat16().requires_grad_() for x in leaves)
        with Allocations() as seen:
            out = block_attention(q, k, v, ranges, backend="tiles")
            torch.autograd.grad(out, (q, k, v), grad.detach())
        beyond[heads] = seen.peak - 4 * q.nbytes
    sums = 2 * 4 * DIM * 2 * LENGTH  # bytes of one head, for k and v
    assert beyond[8] - beyond[2] < 6 * sums / 4


@pytest.mark.parametrize("scratch", [1, 1 << 14, 3 << 13, 1 << 19])
def test_gradients_do_not_depend_on_how_heads_are_grouped(
    monkeypatch: pytest.MonkeyPatch, scratch: int
) -> None:
    """One head at a time, groups of unlike sizes (5 = 2 + 3) and all at once."""
    monkeypatch.setattr(tiles, "SCRATCH", scratch)
    (q, k, v, grad), ranges = problem(10, 5, rows=2)
    found = block_attention(q, k, v, ranges, backend="tiles")
    wanted = dense_attention(q, k, v, ranges, DIM**-0.5)
    for one, other in zip(
        torch.autograd.grad(found, (q, k, v), grad.detach()),
        torch.autograd.grad(wanted, (q, k, v), grad.detach().double()),
        strict=True,
    ):
        torch.testing.assert_close(one, other, check_dtype=False, rtol=1e-4, atol=1e-5)
