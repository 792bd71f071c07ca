"""The GPU benchmark as far as a machine without a GPU runs it.

Kernels are interpreted, the clock is the CPU's, and the peer is dense SDPA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch._dynamo
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention import SDPBackend

from benchmarks.bench_attention import Shape
from benchmarks.gpu import attention, causal, ceilings, checks, metadata, serving
from benchmarks.gpu import problem as problems
from benchmarks.gpu.__main__ import PARTS, jobs, main
from benchmarks.gpu.timing import Figure, cpu_clock, figure, interleaved, ratio

CPU = torch.device("cpu")
TINY = problems.Case(Shape(1, 2, 96, 16), 1, {})


def two_peers(problem: problems.Problem, backend: Any) -> dict[str, attention.Peer]:
    return {"ours": attention.ours(problem, backend), "dense SDPA": attention.dense(problem)}


def measured(**more: Any) -> list[Figure]:
    more = {"backend": "triton", "dtype": torch.float32, "found": two_peers} | more
    return list(attention.run(TINY, CPU, cpu_clock, rounds=2, **more))


def test_all_operators_are_checked_and_a_right_one_passes() -> None:
    told = checks.verify(CPU, (torch.float16, torch.float32), "triton", (64,))
    assert len(told) == 2
    assert all("block_attention, block_decode, masked_loss agree" in line for line in told)


@pytest.mark.parametrize("name", ["block_attention", "block_decode", "masked_loss"])
def test_a_wrong_operator_ends_the_run(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One part in twenty, or a NaN, in what an operator returns."""
    right: Callable[..., Any] = getattr(checks, name)
    for factor in (1.05, math.nan):

        def wrong(*args: Any, backend: str, factor: float = factor, **more: Any) -> Any:
            found = right(*args, backend=backend, **more)
            if backend == "reference":
                return found
            head, *rest = found if isinstance(found, tuple) else (found,)
            return (head * factor, *rest) if rest else head * factor

        monkeypatch.setattr(checks, name, wrong)
        with pytest.raises(checks.WrongResultError, match=f"{name}.*nothing was timed"):
            checks.verify(CPU, (torch.float32,), "tiles")


def test_what_an_operator_leaves_unwritten_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    with checks.unwritten_is_nan():
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()
    right = checks.block_attention

    def unwritten(*args: Any, backend: Any, **more: Any) -> Any:
        out, lse = right(*args, backend=backend, **more)
        padding = torch.arange(out.shape[2]) == 250
        return torch.where(padding[:, None], torch.empty_like(out), out), lse

    monkeypatch.setattr(checks, "block_attention", unwritten)
    with pytest.raises(checks.WrongResultError, match=r"block_attention D=64.*: out.* error nan"):
        checks.verify(CPU, (torch.float32,), "tiles", (64,))


def test_attention_is_checked_with_shared_heads_and_streams_of_any_lengths() -> None:
    seen = []
    for name, actual, expected in checks._attention(CPU, torch.float32, "tiles", (64, 128)):
        assert checks.distance(actual, expected) < 1e-4
        seen.append((name, tuple(actual.shape)))
    rows = {257 * 2, 257 + 243}
    assert {shape[2] for name, shape in seen if name.endswith("out")} == rows
    assert {shape for name, shape in seen if name.endswith("dk") and "128" in name} == {
        (1, 1, n, 128) for n in rows
    }


def test_rates_count_the_pairs_that_are_seen() -> None:
    problem = problems.Problem(TINY, torch.float32, CPU)
    sees = problems.mask_of(problem)
    for seed in range(3):
        problem.renew(seed)
        seen = sum(
            bool(sees(torch.tensor(0), torch.tensor(0), torch.tensor(q), torch.tensor(k)))
            for q in range(96)
            for k in range(96)
        )
        assert problem.pairs == seen
        assert problem.flops(problems.FORWARD) == 4 * 16 * 2 * seen
        assert problem.density() == pytest.approx(seen / 96**2)
        assert problems.tile_waste(problem) * seen >= seen


@pytest.mark.parametrize("groups", [1, 2])
def test_the_causal_limit_counts_its_pairs_both_ways(groups: int) -> None:
    """A clock of one microsecond: rates are the counted FLOPs."""
    case = problems.Case(Shape(1, 2, 96, 16), groups, {})
    arguments: dict[str, Any] = {"backend": "tiles", "dtype": torch.float32, "rounds": 2}

    def clock(call: Callable[[], object]) -> float:
        call()
        return 1e-6

    rows = {
        row.figure: row.value
        for row in causal.run(case, CPU, clock, kernel=SDPBackend.MATH, **arguments)
    }
    pairs = 2 * 2 * sum(range(1, 49))
    for step, per_pair in (("forward", 4), ("backward", 10)):
        end = f"causal over L twice, {case}"
        for name in ("FlashAttention", "ours"):
            assert rows.pop(f"{step}, {name}, {end}") == pytest.approx(per_pair * 16 * pairs / 1e6)
        assert rows.pop(f"{step}, ours over FlashAttention, {end}") == 1
    assert not rows


def test_a_wrong_causal_result_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right = causal.block_attention
    monkeypatch.setattr(causal, "block_attention", lambda *a, **more: 1.05 * right(*a, **more))
    with pytest.raises(AssertionError, match=r"differs from causal FlashAttention by 0\.05"):
        list(
            causal.run(
                TINY, CPU, cpu_clock, rounds=1, backend="tiles", kernel=SDPBackend.MATH,
                dtype=torch.float32,
            )
        )  # fmt: skip


def test_every_peer_has_rates_and_a_ratio() -> None:
    rows = measured(goals={"forward": ">= 360", "over dense SDPA backward": ">= 1.3"})
    names = [row.figure for row in rows]
    for step in ("forward", "backward"):
        for peer in ("ours", "dense SDPA"):
            assert f"{step}, {peer}, {TINY}" in names
    for step in ("forward", "backward", "forward+backward"):
        assert f"{step}, ours over dense SDPA, {TINY}" in names
    for what in ("mask alone", "mask and forward"):
        assert f"{what}, ours, {TINY}" in names
    goals = {row.figure.split(", B=")[0]: row.goal for row in rows if row.goal}
    assert goals == {"forward, ours": ">= 360", "backward, ours over dense SDPA": ">= 1.3"}
    assert all(row.low <= row.value <= row.high for row in rows)


def test_a_peer_that_fails_is_a_row_and_one_that_differs_an_error() -> None:
    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("CUDA out of memory")

    def with_one(peer: attention.Peer) -> Any:
        return lambda problem, backend: two_peers(problem, backend) | {"other": peer}

    rows = measured(found=with_one(attention.Peer(fails)))
    (told,) = (row for row in rows if row.figure == f"other, {TINY}")
    assert told.detail == "RuntimeError: CUDA out of memory"
    assert math.isnan(told.value)
    wrong = attention.Peer(lambda q, k, v: q * k.sum() + v.sum())
    with pytest.raises(AssertionError, match="other differs from ours"):
        measured(found=with_one(wrong))


def test_the_flex_mask_is_that_of_the_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mask function runs here, not compiled; its kernels have no backward pass on a CPU."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    problem = problems.Problem(TINY, torch.float32, CPU)
    peer = attention.flex(problem, {}, tuned=False)
    for seed in (4, 5):
        problem.renew(seed)
        peer.prepare()
        with torch.no_grad():
            found = peer.attend(*problem.inputs)
            wanted = attention.ours(problem, "reference").attend(*problem.inputs)
        assert (found - wanted).abs().max() < 1e-5


def test_decoding_and_losses_are_timed() -> None:
    cache = serving.Cache(2, 300, own=3, heads=4, groups=2, dim=16)
    more = {"rounds": 2, "backend": "tiles", "dtype": torch.float32}
    share, against = serving.decoding(cache, CPU, cpu_clock, **more)
    assert share.unit == "share"
    assert against.unit == "ratio"
    rows = list(serving.losses(9, 16, 50, CPU, cpu_clock, peak=lambda call: 1024.0, **more))
    assert [row.unit for row in rows] == ["TFLOP/s", "ratio", "ratio"]
    product, copy = ceilings.run(CPU, cpu_clock, n=32, size=1 << 12, rounds=2)
    assert (product.unit, copy.unit) == ("TFLOP/s", "GB/s")


def test_bounds_are_timed() -> None:
    (row,) = metadata.bounds(TINY, CPU, cpu_clock, rounds=2, dtype=torch.float32)
    assert row.goal == "<= 50"


@pytest.fixture
def not_lowered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo traces, guards and counts as ever; no code is generated."""
    right = torch.compile

    def traced(function: Any, *, mode: str | None = None, **more: Any) -> Any:
        return right(function, **{"backend": "eager", **more})

    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("not_lowered")
def test_flex_is_never_run_without_being_compiled() -> None:
    """Dynamo compiles the same function 8 times; what comes then must fail, or begin anew."""

    def attend(length: int) -> None:
        problem = problems.Problem(
            problems.Case(Shape(1, 1, length, 16), 1, {}), torch.float32, CPU
        )
        peer = attention.flex(problem, {}, tuned=False)
        peer.prepare()
        with torch.no_grad():
            peer.attend(*problem.inputs)

    for number in range(8):
        attend(64 + 2 * number)
    with pytest.raises(FailOnRecompileLimitHit):
        attend(128)
    measured()  # a case begins anew
    attend(128)


@pytest.mark.usefixtures("not_lowered")
def test_graphs_of_flex_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    count = metadata.flex_recompilations
    (row,) = count(TINY, CPU, segmentations=3, compiler="eager")
    assert (row.value, row.detail) == (0, "forward, over 3 segmentations")
    # Ids of another length each time: every one is compiled, until the limit.
    right, widths = problems.mask_of, iter(range(100))

    def longer(problem: problems.Problem) -> Any:
        block = torch.nn.functional.pad(problem.block, (0, next(widths)))
        return right(SimpleNamespace(block=block, clean=problem.clean))  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(metadata, "mask_of", longer)
    (row,) = count(TINY, CPU, segmentations=20, compiler="eager")
    assert row.value == 7
    assert row.detail == "Dynamo's limit was met at segmentation 8"


def test_rounds_are_interleaved_and_warm_ones_do_not_count() -> None:
    order: list[str] = []
    seconds = interleaved(
        {"a": lambda: order.append("a"), "b": lambda: order.append("b")},
        lambda call: (call(), 2.0)[1], rounds=3, warm=1,
        renew=lambda number: order.append(str(number)),
    )  # fmt: skip
    assert order == ["0", "a", "b", "1", "a", "b", "2", "a", "b", "3", "a", "b"]
    assert seconds == {"a": [2.0] * 3, "b": [2.0] * 3}


def test_medians_ratios_and_their_intervals() -> None:
    row = figure("x", [3.0, 1.0, 2.0], "us")
    assert (row.value, row.low, row.high) == (2.0, 1.0, 3.0)
    assert ratio("x", [4.0, 4.0], [2.0, 2.0]).value == 2.0


def test_every_part_has_jobs_of_their_own_names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    for quick in (False, True):
        found = jobs(CPU, cpu_clock, quick=quick)
        assert tuple(dict.fromkeys(one.part for one in found)) == PARTS
        assert len({(one.part, one.name) for one in found}) == len(found)


def test_without_a_gpu_nothing_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    told: list[str] = []
    assert main(["--results", str(tmp_path)], told.append) == 1
    assert "no NVIDIA GPU" in told[0]
    assert not list(tmp_path.iterdir())
