"""Block attention against its peers: the same mask, inputs and rounds.

TFLOP/s count seen query-key pairs alone: 4 D a pair forward (two products), 10 D backward (five).
Letters: B batch, H query heads, G kv heads, N = 2L rows of both streams, D head dim.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
from abf_kernels.block_attention.api import Backend, block_attention
from abf_kernels.block_attention.metadata import two_stream_ranges
from abf_kernels.block_attention.reference import dense_mask
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.gpu.checks import distance
from benchmarks.gpu.problem import BACKWARD, FORWARD, Case, Problem, mask_of, tile_waste
from benchmarks.gpu.timing import Call, Clock, Figure, figure, interleaved, ratio

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Peer:
    """An attention, and what prepares its mask for the blocks of a round."""

    attend: Attend
    prepare: Call = lambda: None


def ours(problem: Problem, backend: Backend) -> Peer:
    """The kernel of this project; its bounds are made in `prepare`."""

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return block_attention(q, k, v, problem.ranges, backend=backend)

    return Peer(attend)


def dense(problem: Problem) -> Peer:
    """SDPA with a boolean mask."""
    held: dict[str, Tensor] = {}

    def prepare() -> None:
        held["mask"] = dense_mask(problem.ranges, problem.case.shape.length)[:, None]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return scaled_dot_product_attention(q, k, v, attn_mask=held["mask"], enable_gqa=problem.gqa)

    return Peer(attend, prepare)


def flex(problem: Problem, options: dict[str, Any], *, tuned: bool = True) -> Peer:
    """Compiled FlexAttention; `tuned` searches its tiles on this device.

    Dynamo compiles a function for 8 shapes, whoever wraps it, and from then on runs it as it is
    without saying so: dense scores, timed as Flex. With `fullgraph` that is an error instead.

    Args:
        options: its kernel_options, for example a back end.
        tuned: by PyTorch's own autotuning, forward and backward.
    """
    attention: Any = torch.compile(
        flex_attention,
        dynamic=False,
        fullgraph=True,
        mode="max-autotune-no-cudagraphs" if tuned else None,
    )
    held: dict[str, Any] = {}
    sees = mask_of(problem)
    batch, length = problem.case.shape.batch, problem.case.shape.length

    def prepare() -> None:
        held["mask"] = create_block_mask(
            sees, batch, None, length, length, device=problem.device, _compile=tuned
        )

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention(
            q, k, v, block_mask=held["mask"], enable_gqa=problem.gqa, kernel_options=options
        )

    return Peer(attend, prepare)


def flash_is_there() -> bool:
    """Whether FlexAttention's FLASH back end can be imported."""
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False


def peers(problem: Problem, backend: Backend) -> dict[str, Peer]:
    """Ours first, then everybody else that this machine has."""
    found = {"ours": ours(problem, backend), "Flex": flex(problem, {"BACKEND": "TRITON"})}
    if flash_is_there():
        found["Flex FLASH"] = flex(problem, {"BACKEND": "FLASH"}, tuned=False)
    return found | {"dense SDPA": dense(problem)}


def usable(problem: Problem, found: dict[str, Peer]) -> tuple[dict[str, Peer], dict[str, str]]:
    """Peers that run here and agree with ours, and why the others do not."""
    works, failed = {}, {}
    wanted = None
    for name, peer in found.items():
        try:
            peer.prepare()
            inputs = [x.detach().requires_grad_() for x in problem.inputs]
            out = peer.attend(*inputs)
            results = (out, *torch.autograd.grad(out, inputs, problem.grad_out))
        except Exception as error:
            if wanted is None:
                raise
            # Another's limits (memory, an unsupported card) are a row of the table, not the end.
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0][:160]
            continue
        wanted = results if wanted is None else wanted
        for actual, expected in zip(results, wanted, strict=True):
            error = distance(actual, expected)
            assert error < 2e-2, f"{name} differs from ours by {error:.3g} at {problem.case}"
        works[name] = peer
    return works, failed


def run(
    case: Case,
    device: torch.device,
    clock: Clock,
    *,
    rounds: int,
    backend: Backend = "triton",
    dtype: torch.dtype = torch.bfloat16,
    found: Callable[[Problem, Backend], dict[str, Peer]] = peers,
    goals: dict[str, str] | None = None,
) -> Iterator[Figure]:
    """Forward and backward of every peer at one shape, rates and ratios; then mask and all."""
    torch._dynamo.reset()  # what other cases compiled counts against this one's shapes
    problem, goals = Problem(case, dtype, device), goals or {}
    works, failed = usable(problem, found(problem, backend))
    for name, why in failed.items():
        yield Figure(f"{name}, {case}", float("nan"), float("nan"), float("nan"), "", detail=why)
    flops: dict[str, list[int]] = {"forward": [], "backward": []}

    def renew(number: int) -> None:
        problem.renew(number)
        for peer in works.values():
            peer.prepare()
        # Bounds are kept by their ranges: what is timed here is attention.
        works["ours"].attend(*problem.inputs)
        flops["forward"].append(problem.flops(FORWARD))
        flops["backward"].append(problem.flops(BACKWARD))

    def forward(peer: Peer) -> Call:
        def call() -> object:
            with torch.no_grad():
                return peer.attend(*problem.inputs)

        return call

    seconds = {
        "forward": interleaved(
            {name: forward(peer) for name, peer in works.items()}, clock, rounds=rounds, renew=renew
        )
    }
    seconds["backward"] = _backward(problem, works, clock, rounds, renew)
    density, waste = problem.density(), tile_waste(problem) if backend == "triton" else None
    for step, taken in seconds.items():
        work = flops[step][-rounds:]
        for name, series in taken.items():
            rates = [f / s / 1e12 for f, s in zip(work, series, strict=True)]
            goal = goals.get(step, "") if name == "ours" else ""
            yield figure(
                f"{step}, {name}, {case}", rates, "TFLOP/s", goal=goal, density=density,
                waste=waste, detail=f"{1e3 * sorted(series)[rounds // 2]:.3f} ms",
            )  # fmt: skip
    taken = {
        name: [a + b for a, b in zip(series, seconds["backward"][name], strict=True)]
        for name, series in seconds["forward"].items()
    }
    for name in works:
        if name != "ours":
            for step, series in (*seconds.items(), ("forward+backward", taken)):
                goal = goals.get(f"over {name} {step}", "")
                yield ratio(
                    f"{step}, ours over {name}, {case}", series[name], series["ours"], goal=goal
                )
    yield from _with_masks(problem, works, clock, rounds)


def _backward(
    problem: Problem,
    works: dict[str, Peer],
    clock: Clock,
    rounds: int,
    renew: Callable[[int], object],
) -> dict[str, list[float]]:
    graphs: dict[str, tuple[list[Tensor], Tensor]] = {}

    def forwards(number: int) -> None:
        graphs.clear()
        renew(number)
        for name, peer in works.items():
            inputs = [x.detach().requires_grad_() for x in problem.inputs]
            if name == "ours":
                # Once a batch, not in every layer: bounds and lists of the backward pass.
                torch.autograd.grad(peer.attend(*inputs), inputs, problem.grad_out)
            graphs[name] = inputs, peer.attend(*inputs)

    def backward(name: str) -> Call:
        def call() -> object:
            inputs, out = graphs[name]
            return torch.autograd.grad(out, inputs, problem.grad_out)

        return call

    calls = {name: backward(name) for name in works}
    return interleaved(calls, clock, rounds=rounds, renew=forwards)


def _with_masks(
    problem: Problem, works: dict[str, Peer], clock: Clock, rounds: int
) -> Iterator[Figure]:
    """What a new segmentation costs: the mask alone, and inside a forward pass."""

    def remade(name: str, attend: bool) -> Call:
        def call() -> None:
            if name == "ours":
                problem.ranges = two_stream_ranges(*problem.ids, clean_stream="context_causal")
            else:
                works[name].prepare()
            if attend:
                with torch.no_grad():
                    works[name].attend(*problem.inputs)

        return call

    for attend, what in ((False, "mask alone"), (True, "mask and forward")):
        calls = {name: remade(name, attend) for name in works}
        seconds = interleaved(calls, clock, rounds=rounds, renew=problem.renew)
        for name, series in seconds.items():
            yield figure(f"{what}, {name}, {problem.case}", [1e6 * s for s in series], "us")
