"""Linear layer and cross-entropy: every back end against float64 logits written out here.

Letters: R rows, d width, V vocabulary, k likeliest tokens.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from abf_kernels.masked_loss import tiles
from abf_kernels.masked_loss import triton as kernels
from abf_kernels.masked_loss.api import masked_loss, predict

from tests.kernels.fresh import fresh
from tests.kernels.poison import poison

# Largest error over largest value, of nats (float32 at least) and of gradients (in the dtype).
NATS = {torch.float64: 1e-13, torch.float32: 3e-6, torch.float16: 3e-6, torch.bfloat16: 2e-2}
GRADS = {torch.float64: 1e-13, torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 6e-2}


@pytest.fixture(autouse=True)
def nan_in_uninitialised_memory(monkeypatch):
    """Whatever a back end reads before writing turns its results into NaN."""
    poison(monkeypatch)


@pytest.fixture(params=["reference", "tiles", "small tiles", "triton", "small triton"])
def backend(request, monkeypatch):
    """Each back end; also with constants that cut these small inputs otherwise."""
    if request.param == "small tiles":
        monkeypatch.setattr(tiles, "CHUNK", 300)
    if request.param == "small triton":
        monkeypatch.setattr(kernels, "SLICE", 300)  # one vocabulary tile a slice of the gradient
        monkeypatch.setattr(kernels, "PROGRAMS", 1)  # one split
    return request.param.removeprefix("small ")


def draw(R, d, V, dtype=torch.float32, *, scale=1.0):
    generator = fresh()
    hidden = torch.randn(R, d, generator=generator).mul(scale).to(dtype)
    matrix = torch.randn(V, d, generator=generator).to(dtype)
    target = torch.randint(V, (R,), generator=generator)
    weight = torch.rand(R, generator=generator) * 3
    weight[::5] = 0
    return hidden, matrix, target, weight


def oracle(hidden, matrix, target):
    """Float64 [R] nats, [R] entropy and [R,V] probabilities, by exponentials of logits."""
    logits = hidden.double() @ matrix.double().T
    away = logits - logits.amax(1, keepdim=True).detach()
    probs = away.exp() / away.exp().sum(1, keepdim=True)
    log_probs = away - away.exp().sum(1, keepdim=True).log()
    nats = -log_probs[torch.arange(len(hidden)), target]
    entropy = -torch.where(probs > 0, probs * log_probs, 0.0).sum(1)
    return nats, entropy, probs


def off(found, wanted):
    """Largest error over largest value."""
    return float((found.double() - wanted).abs().max() / wanted.abs().max().clamp(min=1e-30))


def check_loss(inputs, backend, dtype):
    hidden, matrix, target, weight = inputs
    low = [hidden.clone().requires_grad_(), matrix.clone().requires_grad_()]
    wide = [hidden.double().requires_grad_(), matrix.double().requires_grad_()]
    nats = oracle(*wide, target)[0] * weight
    wanted = torch.autograd.grad(3 * nats.sum(), wide)
    total, found = masked_loss(*low, target, weight, backend=backend)
    grads = torch.autograd.grad(3 * total, low)
    assert not found.requires_grad
    assert found.dtype == torch.promote_types(dtype, torch.float32)
    assert off(found, nats.detach()) < NATS[dtype]
    assert off(total.detach(), nats.sum().detach()) < NATS[dtype]
    for one, other in zip(grads, wanted, strict=True):
        assert one.dtype == dtype
        assert off(one, other) < GRADS[dtype]
    assert not grads[0][weight == 0].any(), "rows of no weight have no gradient"


SHAPES = [(1, 1, 1), (1, 16, 5), (5, 3, 257), (33, 40, 64), (70, 33, 203)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("R", "d", "V"), SHAPES)
def test_values_and_gradients(R, d, V, dtype, backend):
    check_loss(draw(R, d, V, dtype), backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("cpu_backend", ["reference", "tiles"])
def test_other_precisions(dtype, cpu_backend):
    check_loss(draw(41, 24, 203, dtype), cpu_backend, dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("R", "d", "V"), SHAPES)
def test_predictions(R, d, V, dtype, backend):
    inputs = hidden, matrix, target, _ = draw(R, d, V, dtype, scale=0.3)
    nats, entropy, probs = oracle(*inputs[:3])
    # The interpreter pays for every one of them, and of rows for whole tiles.
    for top in sorted({1, min(3, V)} | ({min(8, V)} if R < 10 else set())):
        found = predict(hidden, matrix, target, backend=backend, top=top)
        best = probs.topk(top)
        assert found.nats is not None
        assert off(found.nats, nats) < NATS[dtype]
        assert (found.entropy.double() - entropy).abs().max() < 1e-5
        assert (found.top_probs.double() - best.values).abs().max() < 1e-6
        # By value: float32 and float64 may order two close logits otherwise.
        assert (probs.gather(1, found.top_ids) - best.values).abs().max() < 1e-6
        assert all(len(set(row)) == top for row in found.top_ids.tolist())
    assert predict(hidden, matrix, backend=backend).nats is None


def test_of_equals_the_lowest_id_comes_first(backend):
    # Small integers: every product and sum is exact, so equal logits are bit-equal.
    hidden, matrix, _, _ = (x.mul(2).round() for x in draw(40, 8, 300))
    matrix[200:250] = matrix[100:150] = matrix[:50]
    logits = hidden @ matrix.T
    best = logits.amax(1, keepdim=True)
    assert ((logits == best).sum(1) > 1).any()
    found = predict(hidden, matrix, backend=backend, top=4)
    assert found.top_ids[:, 0].tolist() == [row.nonzero()[0, 0] for row in logits == best]
    assert torch.equal(logits.gather(1, found.top_ids), logits.topk(4).values)
    assert all(len(set(row)) == 4 for row in found.top_ids.tolist())
    flat = predict(torch.zeros(3, 8), matrix, backend=backend, top=8)
    assert flat.top_ids[:, 0].tolist() == [0, 0, 0]
    assert all(len(set(row)) == 8 for row in flat.top_ids.tolist())
    torch.testing.assert_close(flat.top_probs, torch.full((3, 8), 1 / 300))
    torch.testing.assert_close(flat.entropy, torch.full((3,), 300.0).log())


def test_large_logits_neither_overflow_nor_lose_their_differences(backend):
    hidden, matrix, target, weight = draw(20, 16, 150, scale=3e4)
    nats, entropy, probs = oracle(hidden, matrix, target)
    total, found = masked_loss(hidden, matrix, target, weight, backend=backend)
    said = predict(hidden, matrix, backend=backend)
    assert off(found, nats * weight) < 1e-6
    assert torch.isfinite(total)
    # Logits of 1e5 are multiples of 1/128.
    assert (said.entropy.double() - entropy).abs().max() < 0.1
    assert (said.top_probs[:, 0].double() - probs.amax(1)).abs().max() < 0.1


def test_nan_stays_in_its_row(backend):
    hidden, matrix, target, weight = draw(20, 16, 70)
    hidden[7, 3] = torch.nan
    weight += 1
    _, found = masked_loss(hidden, matrix, target, weight, backend=backend)
    said = predict(hidden, matrix, backend=backend)
    for values in (found, said.entropy):
        assert values.isnan().nonzero().tolist() == [[7]]


def test_no_rows(backend):
    hidden, matrix, target, weight = draw(0, 8, 12)
    matrix.requires_grad_()
    total, nats = masked_loss(hidden, matrix, target, weight, backend=backend)
    (grad,) = torch.autograd.grad(total, matrix)
    assert total.item() == 0
    assert nats.shape == (0,)
    assert grad.shape == matrix.shape
    assert not grad.any()
    said = predict(hidden, matrix, target, backend=backend, top=3)
    assert [list(x.shape) for x in said if x is not None] == [[0], [0], [0, 3], [0, 3]]


def test_no_weights_are_ones_and_one_side_may_be_constant(backend):
    hidden, matrix, target, _ = draw(23, 8, 70)
    ones = torch.ones(23)
    total, _ = masked_loss(hidden, matrix.requires_grad_(), target, backend=backend)
    same, _ = masked_loss(hidden, matrix, target, ones, backend=backend)
    assert torch.equal(total, same)
    (alone,) = torch.autograd.grad(total, matrix)
    both, _ = masked_loss(hidden.requires_grad_(), matrix, target.int(), backend=backend)
    grads = torch.autograd.grad(both, (hidden, matrix))
    assert torch.equal(grads[1], alone)
    only, _ = masked_loss(hidden, matrix.detach(), target, backend=backend)
    assert torch.equal(torch.autograd.grad(only, hidden)[0], grads[0])
    with torch.no_grad():
        assert torch.equal(masked_loss(hidden, matrix, target, backend=backend)[0], total)


def test_results_do_not_depend_on_the_run(backend):
    hidden, matrix, target, weight = draw(70, 33, 203)
    runs = []
    for _ in range(2):
        low = [hidden.clone().requires_grad_(), matrix.clone().requires_grad_()]
        total, nats = masked_loss(*low, target, weight, backend=backend)
        said = predict(hidden.clone(), matrix.clone(), target, backend=backend, top=2)
        runs.append([total, nats, *torch.autograd.grad(total, low), *said])
    assert all(torch.equal(one, other) for one, other in zip(*runs, strict=True))


def test_products_of_less_precision_round_the_operands(backend):
    """Mixed precision: float32 rows and matrix, float16 products."""
    hidden, matrix, target, weight = draw(30, 24, 90)
    rounded = hidden.half().double(), matrix.half().double()
    _, nats = masked_loss(hidden, matrix, target, weight, backend=backend, precision=torch.float16)
    assert nats.dtype == torch.float32
    assert off(nats, oracle(*rounded, target)[0] * weight) < NATS[torch.float16]


def test_rows_beyond_two_to_the_31_elements(backend):
    """Addresses have 64 bits: rows 2^30 elements apart, of which three pages exist."""
    d, apart = 8, 1 << 30
    memory = torch.from_numpy(np.empty(2 * apart + d, dtype=np.float16))
    far = memory.as_strided((3, d), (apart, 1))
    hidden, matrix, target, _ = draw(3, d, 3, torch.float16)
    far.copy_(matrix)
    wanted = masked_loss(hidden, matrix, target, backend=backend)[1]
    assert torch.equal(masked_loss(hidden, far, target, backend=backend)[1], wanted)
    far.copy_(hidden)
    assert torch.equal(masked_loss(far, matrix, target, backend=backend)[1], wanted)


def test_autocast_does_not_reach_the_products(backend):
    hidden, matrix, target, weight = draw(30, 24, 90)
    wanted = masked_loss(hidden, matrix, target, weight, backend=backend)[1]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(masked_loss(hidden, matrix, target, weight, backend=backend)[1], wanted)


def test_a_slice_of_the_gradient_is_no_wider_than_a_grid(monkeypatch):
    """Two tiles at most, of 32 tokens each: 203 tokens are four slices."""
    widths, launch = [], kernels._launch_slope

    def launched(*args):
        widths.append(args[5].shape[1])
        launch(*args)

    monkeypatch.setattr(kernels, "GRID", 2)
    monkeypatch.setattr(kernels, "_launch_slope", launched)
    check_loss(draw(3, 8, 203), "triton", torch.float32)
    assert widths == [64, 64, 64, 11]
