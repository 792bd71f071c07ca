"""The limit without a mask: FlashAttention, causal, over L, twice; ours given causal ranges.

It has as many pairs as the two streams, but for the blocks' own, and nothing ragged. Letters: B
batch, H query heads, G kv heads, L tokens of a row, D head dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from abf_kernels.block_attention.api import Backend, block_attention
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.attention import Attend
from benchmarks.gpu.checks import distance
from benchmarks.gpu.problem import BACKWARD, FORWARD, Case
from benchmarks.gpu.timing import Call, Clock, Figure, figure, interleaved, ratio


def run(
    case: Case,
    device: torch.device,
    clock: Clock,
    *,
    rounds: int,
    backend: Backend = "triton",
    kernel: SDPBackend = SDPBackend.FLASH_ATTENTION,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[Figure]:
    """TFLOP/s of both, forward and backward, and the ratios of their seconds.

    Args:
        case: its 2B rows of L tokens are attended to.
        device: with the clock's.
        clock: of the device.
        rounds: timed ones.
        backend: of ours.
        kernel: of PyTorch's SDPA; no other is taken in its place.
        dtype: of the inputs.
    """
    shape = case.shape
    batch, length = 2 * shape.batch, shape.length // 2
    heads = (shape.heads, case.groups, case.groups)
    inputs = [
        torch.randn(batch, n, length, shape.dim, device=device).to(dtype).requires_grad_()
        for n in heads
    ]
    grad_out = torch.randn_like(inputs[0])
    position = torch.arange(length, dtype=torch.int32, device=device)
    nothing = torch.zeros_like(position)
    ranges = torch.stack((nothing, position + 1, nothing, nothing), -1)
    ranges = ranges.expand(batch, -1, -1).contiguous()

    def flash(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(kernel):
            return scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=shape.heads != case.groups
            )

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, ranges, backend=backend)

    def forward(attend: Attend) -> Call:
        def call() -> object:
            with torch.no_grad():
                return attend(*inputs)

        return call

    def backward(out: Tensor) -> Call:
        return lambda: torch.autograd.grad(out, inputs, grad_out, retain_graph=True)

    peers = {"FlashAttention": flash, "ours": ours}
    outs = {name: attend(*inputs) for name, attend in peers.items()}
    results = [(out, *torch.autograd.grad(out, inputs, grad_out, retain_graph=True))
               for out in outs.values()]  # fmt: skip
    for expected, actual in zip(*results, strict=True):
        error = distance(actual, expected)
        assert error < 2e-2, f"ours differs from causal FlashAttention by {error:.3g} at {case}"

    calls = {
        "forward": ({name: forward(attend) for name, attend in peers.items()}, FORWARD),
        "backward": ({name: backward(out) for name, out in outs.items()}, BACKWARD),
    }
    pairs = shape.heads * batch * length * (length + 1) // 2
    for step, (variants, per_pair) in calls.items():
        seconds = interleaved(variants, clock, rounds=rounds)
        for name, series in seconds.items():
            rates = [per_pair * shape.dim * pairs / s / 1e12 for s in series]
            yield figure(f"{step}, {name}, causal over L twice, {case}", rates, "TFLOP/s")
        yield ratio(
            f"{step}, ours over FlashAttention, causal over L twice, {case}",
            seconds["FlashAttention"],
            seconds["ours"],
        )
