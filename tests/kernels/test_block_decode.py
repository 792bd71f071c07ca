"""Decoding attention: every back end against a float64 computation written out here, key by key.

Letters: B requests, N query rows, P new rows, H query heads, G kv heads, D head dim, S keys of a
page, C pages, n cached keys.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from abf_kernels.block_decode import tiles
from abf_kernels.block_decode import triton as kernels
from abf_kernels.block_decode.api import (
    Requests,
    block_decode,
    decode_part,
    merge,
    requests,
)
from torch import Tensor

from tests.kernels.fresh import fresh
from tests.kernels.poison import poison

# Largest error over largest value.
TOLERANCE = {
    torch.float64: 1e-13,
    torch.float32: 3e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1e-2,
}


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory(monkeypatch):
    """Whatever a back end reads before writing turns its results into NaN."""
    poison(monkeypatch)


@pytest.fixture(params=["reference", "tiles", "small tiles", "triton", "small triton"])
def backend(request, monkeypatch):
    """Each back end; also with constants that split these short histories."""
    if request.param == "small tiles":
        monkeypatch.setattr(tiles, "SCRATCH", 300)
        monkeypatch.setattr(tiles, "ROWS", 4)
    if request.param == "small triton":
        monkeypatch.setattr(kernels, "SHARE", 32)
    return request.param.removeprefix("small ")


@dataclass
class Case:
    """Tensors of a call; pages and rows that nobody may read hold NaN."""

    q: Tensor
    k: Tensor
    v: Tensor
    keys: Tensor
    values: Tensor
    asked: Requests

    @property
    def tensors(self):
        return self.q, self.k, self.v, self.keys, self.values


def draw(
    cached, queries, own, *, heads=(4, 2), dim=16, page=16, causal=False, gap=1, dtype=torch.float32
):
    """Requests of so many cached keys, queries and new rows, `gap` rows of nobody between them."""
    generator = fresh()

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(dtype)

    used = [-(-n // page) for n in cached]
    pages = sum(used) + 2
    order = torch.randperm(pages, generator=generator).int()
    table = torch.full((len(cached), max(1, *used)), -7, dtype=torch.int32)
    keys = torch.full((pages, heads[1], page, dim), math.nan, dtype=dtype)
    values = keys.clone()
    taken = 0
    for request, (n, count) in enumerate(zip(cached, used, strict=True)):
        table[request, :count] = order[taken : taken + count]
        taken += count
        for at in range(n):
            place = table[request, at // page], slice(None), at % page
            keys[place], values[place] = normal(heads[1], dim), normal(heads[1], dim)

    def ranges(sizes):
        ends = np.cumsum(np.array(sizes) + gap)
        return torch.tensor(
            [(end - size, end) for end, size in zip(ends, sizes, strict=True)]
        ).int()

    of_q, of_k = ranges(queries), ranges(own)
    q = torch.full((int(of_q[-1, 1]) + gap, heads[0], dim), math.nan, dtype=dtype)
    k = torch.full((int(of_k[-1, 1]) + gap, heads[1], dim), math.nan, dtype=dtype)
    v = k.clone()
    seen = torch.full((len(q),), -3, dtype=torch.int32)
    for (first, last), (start, end) in zip(of_q.tolist(), of_k.tolist(), strict=True):
        q[first:last] = normal(last - first, heads[0], dim)
        k[start:end], v[start:end] = (normal(end - start, heads[1], dim) for _ in "kv")
        size = end - start
        seen[first:last] = (torch.arange(1, last - first + 1).clamp(max=size)) if causal else size
    asked = requests(
        table, torch.tensor(cached).int(), of_q, of_k, seen,
        page_size=page, pages=pages, rows=len(q), own_rows=len(k),
    )  # fmt: skip
    return Case(q, k, v, keys, values, asked)


def oracle(case, *, history=True, own=True, scale=None):
    """Float64 [N,H,D] and [N,H], one query and head at a time."""
    q, k, v, keys, values = (x.double() for x in case.tensors)
    asked = case.asked
    N, H, D = q.shape
    out, lse = torch.zeros(N, H, D).double(), torch.full((N, H), -math.inf).double()
    for request, (first, last) in enumerate(asked.queries.tolist()):
        pages, start = asked.table[request].tolist(), asked.own[request][0]
        for row, head in itertools.product(range(first, last), range(H)):
            group = head // (H // keys.shape[1])
            visible = []
            if history:
                for at in range(int(asked.lengths[request])):
                    page, slot = pages[at // asked.page_size], at % asked.page_size
                    visible.append((keys[page, group, slot], values[page, group, slot]))
            if own:
                for at in range(start, start + int(asked.seen[row])):
                    visible.append((k[at, group], v[at, group]))
            if visible:
                scores = torch.stack([one for one, _ in visible]) @ q[row, head]
                scores *= scale or D**-0.5
                lse[row, head] = scores.logsumexp(0)
                out[row, head] = scores.softmax(0) @ torch.stack([other for _, other in visible])
    return out, lse


def off(found, wanted):
    """Largest error over largest value; -inf must be where it is wanted."""
    assert found.shape == wanted.shape
    nothing = wanted == -math.inf
    assert torch.equal(found == -math.inf, nothing)
    found, wanted = (x.double().masked_fill(nothing, 0.0) for x in (found, wanted))
    return float((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


CASES = {
    "one key": {"cached": [1], "queries": [1], "own": [0]},
    "one row": {"cached": [0], "queries": [1], "own": [1]},
    "ragged": {"cached": [5, 0, 47, 16], "queries": [3, 1, 20, 2], "own": [3, 1, 20, 2]},
    "causal": {"cached": [33, 40], "queries": [19, 2], "own": [19, 2], "causal": True},
    "sees nothing": {"cached": [0, 3], "queries": [2, 1], "own": [0, 0]},
    "no gaps": {"cached": [20, 3], "queries": [4, 4], "own": [4, 4], "gap": 0},
    "more new rows than queries": {"cached": [7, 70], "queries": [2, 1], "own": [9, 33]},
    "one head each, odd sizes": {
        "cached": [77, 9], "queries": [5, 6], "own": [5, 6], "heads": (3, 3), "dim": 40, "page": 7,
    },
    "all heads share keys": {
        "cached": [130], "queries": [9], "own": [9], "heads": (6, 1), "dim": 64, "page": 256,
    },
}  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_values(name, dtype, backend):
    check(draw(**CASES[name], dtype=dtype), backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cpu_backend", ["reference", "tiles"])
def test_other_precisions(dtype, cpu_backend):
    check(draw(**CASES["ragged"], dtype=dtype), cpu_backend, dtype)


def check(case, backend, dtype):
    found = block_decode(*case.tensors, case.asked, backend=backend)
    assert found.dtype == dtype
    assert off(found, oracle(case)[0]) < TOLERANCE[dtype]
    q, k, v, keys, values = case.tensors
    history = decode_part(q, keys, values, case.asked, part="history", backend=backend)
    own = decode_part(q, k, v, case.asked, part="own", backend=backend)
    for part, wanted in (
        (history, oracle(case, own=False)),
        (own, oracle(case, history=False)),
        (merge(*history, *own), oracle(case)),
    ):
        assert part[0].dtype == part[1].dtype == torch.promote_types(dtype, torch.float32)
        assert off(part[0], wanted[0]) < TOLERANCE[dtype]
        assert off(part[1], wanted[1]) < TOLERANCE[dtype]


def test_scale_and_sharp_scores(backend):
    case = draw([70, 5], [3, 4], [3, 4])
    found = block_decode(*case.tensors, case.asked, backend=backend, scale=30.0)
    assert off(found, oracle(case, scale=30.0)[0]) < 1e-4


def test_a_request_is_answered_alike_whoever_is_beside_it(backend):
    """Bit for bit: neither the neighbours' lengths nor their number matter."""
    case = draw([40, 300, 3], [6, 2, 9], [6, 2, 9], page=50)
    together = block_decode(*case.tensors, case.asked, backend=backend)
    for request, (first, last) in enumerate(case.asked.queries.tolist()):
        only = {
            name: getattr(case.asked, name)[request : request + 1]
            for name in ("table", "lengths", "queries", "own")
        }
        asked = requests(
            **only, seen=case.asked.seen, page_size=50, pages=len(case.keys), rows=len(case.q),
            own_rows=len(case.k),
        )  # fmt: skip
        alone = block_decode(*case.tensors, asked, backend=backend)
        assert torch.equal(alone[first:last], together[first:last])
        assert not alone[:first].any()
        assert not alone[last:].any()


def test_a_shared_page_is_read_by_both(backend):
    case = draw([16, 16], [2, 2], [2, 2])
    case.asked.table[1] = case.asked.table[0]
    found = block_decode(*case.tensors, case.asked, backend=backend)
    assert off(found, oracle(case)[0]) < TOLERANCE[torch.float32]


def test_nan_reaches_those_who_see_it(backend):
    case = draw([20, 20], [3, 3], [3, 3], causal=True)
    case.k[int(case.asked.own[0, 0]) + 2, 0, 1] = math.nan  # the last new key of request 0, group 0
    found = block_decode(*case.tensors, case.asked, backend=backend)
    last = int(case.asked.queries[0, 1]) - 1
    rows = found.isnan().any(dim=2).nonzero().tolist()
    assert rows == [[last, 0], [last, 1]]


def test_pages_beyond_two_to_the_31_elements(backend):
    """Addresses have 64 bits: pages 2^30 elements apart, the two that are read behind 2^31."""
    case = draw([20], [3], [3], heads=(2, 1), dim=8, dtype=torch.float16)
    wanted = block_decode(*case.tensors, case.asked, backend=backend)
    asked = dataclasses.replace(case.asked, table=torch.tensor([[3, 2]], dtype=torch.int32))
    apart, shape = 1 << 30, case.keys.shape

    def far(pages):
        memory = torch.from_numpy(np.empty(3 * apart + pages[0].numel(), dtype=np.float16))
        moved = memory.as_strided(shape, (apart, *pages.stride()[1:]))
        moved[[3, 2]] = pages[case.asked.table[0].long()]
        return moved

    tensors = case.q, case.k, case.v, far(case.keys), far(case.values)
    assert torch.equal(block_decode(*tensors, asked, backend=backend), wanted)


def test_heads_may_lie_apart(backend):
    case = draw([40], [3], [3])
    wanted = block_decode(*case.tensors, case.asked, backend=backend)
    strided = [torch.stack((x, x), dim=1)[:, 1] for x in case.tensors]
    assert not strided[0].is_contiguous()
    assert torch.equal(block_decode(*strided, case.asked, backend=backend), wanted)


def test_merge_refuses_what_does_not_fit():
    out, lse = torch.zeros(3, 2, 4), torch.zeros(3, 2)
    for message, bad in {
        "lse1 must have shape": (out, out, out, lse),
        "out2 must have shape": (out, lse, out[:2], lse),
        "lse2 must have out1's dtype": (out, lse, out, lse.double()),
        "out1 must have out1's dtype, a float": (out.int(), lse, out, lse),
        "lse2 must have out1's device": (out, lse, out, lse.to("meta")),
    }.items():
        with pytest.raises(ValueError, match=message):
            merge(*bad)
