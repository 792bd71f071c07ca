"""Chunked head cross-entropy against torch's, values and gradients."""

import pytest
import torch
from torch.nn import functional as F

from abf.diffusion import head
from abf.diffusion.head import head_nll, head_reads

R, d, V = 37, 11, 53


def inputs(dtype: torch.dtype = torch.float64):
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(R, d, dtype=dtype, generator=generator)
    matrix = torch.randn(V, d, dtype=dtype, generator=generator)
    target = torch.randint(V, (R,), generator=generator)
    weight = torch.rand(R, dtype=torch.float64, generator=generator) * 3
    return states.requires_grad_(), matrix.requires_grad_(), target, weight


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("backend", ["reference", "tiles"])
def test_equals_cross_entropy(backend, weighted):
    states, matrix, target, weight = inputs()
    plain = F.cross_entropy(states @ matrix.T, target, reduction="none")
    plain = plain * weight if weighted else plain
    (3 * plain.sum()).backward()
    wanted = states.grad, matrix.grad
    states.grad = matrix.grad = None
    total, nll = head_nll(states, matrix, target, weight if weighted else None, backend=backend)
    (3 * total).backward()
    torch.testing.assert_close(nll, plain.detach())
    torch.testing.assert_close(total, plain.sum())
    torch.testing.assert_close((states.grad, matrix.grad), wanted)
    assert not nll.requires_grad


def test_without_gradients_gives_the_same_values():
    states, matrix, target, weight = inputs()
    total, nll = head_nll(states, matrix, target, weight, backend="tiles")
    with torch.no_grad():
        quiet = head_nll(states, matrix, target, weight, backend="tiles")
    assert torch.equal(quiet[0], total.detach())
    assert torch.equal(quiet[1], nll)


def test_no_rows_cost_nothing():
    states, matrix, target, weight = inputs()
    total, nll = head_nll(states[:0], matrix, target[:0], weight[:0], backend="tiles")
    total.backward()
    assert total.item() == 0
    assert len(nll) == 0
    assert matrix.grad is not None
    assert not matrix.grad.any()


def test_autocast_multiplies_in_bfloat16_and_sums_in_float32():
    states, matrix, target, weight = inputs(torch.float32)
    exact, _ = head_nll(states, matrix, target, weight, backend="tiles")
    exact.backward()
    grads = states.grad, matrix.grad
    states.grad = matrix.grad = None
    with torch.autocast("cpu", torch.bfloat16):
        total, nll = head_nll(states, matrix, target, weight, backend="tiles")
    total.backward()
    logits = (states.detach().bfloat16() @ matrix.detach().bfloat16().T).float()
    same = F.cross_entropy(logits, target, reduction="none") * weight
    torch.testing.assert_close(nll, same.float())
    assert nll.dtype == torch.float32
    torch.testing.assert_close(total, exact, rtol=2e-2, atol=0)
    for found, wanted in zip((states.grad, matrix.grad), grads, strict=True):
        assert found is not None
        assert wanted is not None
        assert (found - wanted).norm() < 2e-2 * wanted.norm()


@pytest.mark.parametrize("mix", [0.0, 0.1])
@pytest.mark.parametrize("chunk", [7, 1 << 25])
def test_reads_are_those_of_all_logits(mix, chunk, monkeypatch):
    monkeypatch.setattr(head, "CHUNK", chunk)
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(9, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(6, 5, generator=generator, dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([[0, 5, 5]] * 8 + [[2, 2, 1]])
    pull = torch.randn(9, 3, generator=generator, dtype=torch.float64)
    lift = torch.randn(9, generator=generator, dtype=torch.float64)

    log_probs = (states @ matrix.T).log_softmax(1)
    floor = torch.log((1 - mix) * log_probs.exp() + mix / 6).mean(1) if mix else torch.zeros(9)
    wanted = (log_probs.gather(1, tokens) * pull).sum() + (floor * lift).sum()
    expected = torch.autograd.grad(wanted, (states, matrix))
    found, low = head_reads(states, matrix, tokens, mix=mix)
    torch.testing.assert_close(found, log_probs.gather(1, tokens))
    torch.testing.assert_close(low, floor.double())
    total = (found * pull).sum() + (low * lift).sum()
    for one, other in zip(torch.autograd.grad(total, (states, matrix)), expected, strict=True):
        torch.testing.assert_close(one, other)
