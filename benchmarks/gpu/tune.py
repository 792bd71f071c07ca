"""Tile sizes by measurement: the fastest on this device become rows of an operator's configs.json.

    make bench-gpu ARGS=--tune

Letters: B batch, H query heads, G kv heads, D head dim, R rows, d width, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from importlib import import_module
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from abf_kernels import tuning
from abf_kernels.ahead import STACK, TARGETS, report
from torch import Tensor
from triton.compiler.errors import CompilationError
from triton.runtime.errors import OutOfResources

from benchmarks.gpu import serving
from benchmarks.gpu.attention import ours
from benchmarks.gpu.checks import TOLERANCE, distance
from benchmarks.gpu.problem import CASES, Case, Problem
from benchmarks.gpu.timing import Clock

Tile = dict[str, int]


def tiles(**sizes: Iterable[int]) -> tuple[Tile, ...]:
    """Every combination."""
    names = sizes.keys()
    return tuple(dict(zip(names, each, strict=True)) for each in itertools.product(*sizes.values()))


class Search(NamedTuple):
    """What is varied, and what is timed meanwhile."""

    operator: str
    dim: int
    """Head dim; 0 for the loss."""
    tiles: Sequence[Tile]
    """Tried for each kernel, the others as they are."""
    call: Callable[[], Sequence[Tensor]]
    """Runs all kernels of the operator, so that one that slows its neighbours does not look good;
    what it returns must not depend on tiles."""

    def configs(self) -> Any:
        """The reader of its table."""
        return import_module(f"abf_kernels.{self.operator}.configs")


def searches(
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    cases: Sequence[Case] = (CASES[2], CASES[0]),
    caches: Sequence[serving.Cache] = (serving.Cache(1, 131_072, dim=64), serving.CACHES[0]),
    sizes: tuple[int, int, int] = serving.LOSSES[0],
) -> Iterator[Search]:
    """Attention forward and backward, decoding at batch 1, the loss forward and backward."""
    shapes = {"rows": (32, 64, 128), "keys": (32, 64, 128)}
    more = tiles(**shapes, num_warps=(4, 8), num_stages=(2, 3, 4))
    for case in cases:
        yield Search("block_attention", case.shape.dim, more, _attention(case, dtype, device))
    more = tiles(rows=(16, 32, 64, 128), columns=(32, 64, 128), warps=(4, 8), stages=(2, 3, 4))
    for cache in caches:
        call = serving.prepared(cache, device, dtype).ours("triton")
        yield Search("block_decode", cache.dim, more, lambda call=call: (call(),))
    shapes = {"rows": (32, 64, 128), "columns": (64, 128), "width": (32, 64)}
    more = tiles(**shapes, warps=(4, 8), stages=(2, 3, 4))
    call = serving.loss_calls(*sizes, device, dtype, "triton")["ours"]
    yield Search("masked_loss", 0, more, call)


def _attention(
    case: Case, dtype: torch.dtype, device: torch.device
) -> Callable[[], Sequence[Tensor]]:
    problem = Problem(case, dtype, device)
    peer = ours(problem, "triton")

    def both() -> Sequence[Tensor]:
        inputs = [x.detach().requires_grad_() for x in problem.inputs]
        out = peer.attend(*inputs)
        return out.detach(), *torch.autograd.grad(out, inputs, problem.grad_out)

    return both


def stacks(row: tuning.Row, operator: str) -> dict[str, int]:
    """Bytes that each kernel of a row spills on its target, 0 for most."""
    found = dict.fromkeys(row.tiles, 0)
    for build in import_module(f"abf_kernels.{operator}.builds").builds([row]):
        name = build.kernel.__name__.strip("_").removesuffix("_kernel")
        kernel = name if name in found else next(iter(found))
        found[kernel] = max(found[kernel], report(build).stack_bytes)
    return found


def fastest(
    search: Search,
    capability: tuple[int, int],
    source: str,
    clock: Clock,
    say: Callable[[str], object],
    *,
    itemsize: int = 2,
    rounds: int = 7,
    spilled: Callable[[tuning.Row, str], dict[str, int]] = stacks,
) -> tuning.Row:
    """The row with each kernel's fastest tile that fits, agrees and does not spill too much.

    Attention may spill `STACK` bytes, and says so in its row; the others nothing.

    Raises:
        ValueError: a capability that kernels are not compiled for ahead of time.
    """
    if 10 * capability[0] + capability[1] not in TARGETS:
        names = ", ".join(f"sm_{target}" for target in TARGETS)
        raise ValueError(
            f"tiles are measured for {names}; this is {tuning.architecture(capability)}. Give "
            "abf_kernels.ahead its limits (TARGETS, SHARED) first"
        )
    configs, chip = search.configs(), tuning.architecture(capability)
    base = configs.ROWS.get((chip, search.dim, itemsize))
    base = base or configs.ROWS[tuning.DEFAULT, search.dim, itemsize]
    best = replace(base, architecture=chip, spills={}, source=source)
    with _with(search, best):
        wanted = search.call()
    tolerance = TOLERANCE[wanted[0].dtype]
    for kernel in best.tiles:
        found: list[tuple[float, tuning.Row]] = []
        for tile in (best.tiles[kernel], *search.tiles):
            row = replace(best, tiles=best.tiles | {kernel: tile})
            with _with(search, row):
                try:
                    results = search.call()
                except (OutOfResources, CompilationError):
                    continue  # does not fit this device
                pairs = zip(results, wanted, strict=True)
                if not max(distance(*pair) for pair in pairs) <= tolerance:
                    say(f"{search.operator} {kernel} {tile}: wrong result, left out")
                    continue
                seconds = sorted(clock(search.call) for _ in range(rounds))[rounds // 2]
            found.append((seconds, row))
        most = STACK if search.operator == "block_attention" else 0
        for seconds, row in sorted(found, key=lambda pair: pair[0]):
            stack = spilled(row, search.operator)[kernel]
            if stack <= most:
                gain, tried = found[0][0] / seconds, f"{len(found)} tiles measured"
                why = {kernel: f"{stack} bytes; the fastest of {tried}"} if stack else {}
                best = replace(row, spills=best.spills | why)
                break
        else:
            raise ValueError(f"every tile of {search.operator} {kernel} spills too much")
        name = f"{search.operator} D={search.dim} {kernel}"
        say(f"{name}: {best.tiles[kernel]}, {gain:.3f}x the one in use; {tried}")
    return best


def _with(search: Search, row: tuning.Row) -> Any:
    """Launches take the tiles of this row."""
    kernels = import_module(f"abf_kernels.{search.operator}.triton")
    config = search.configs().parse(row)
    return patch.object(kernels, "choose", lambda *_: config)


def write(operator: str, row: tuning.Row) -> None:
    """Put a row into an operator's file, in place of the one of its key."""
    configs = import_module(f"abf_kernels.{operator}.configs")
    rows = tuning.read(configs.FILE)
    tuning.write(configs.FILE, [*(r for key, r in rows.items() if key != row.key), row])
