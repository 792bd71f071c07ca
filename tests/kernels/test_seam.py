"""Decoding and the head's loss through the seam, Triton against the CPU path."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from abf_kernels.masked_loss.api import Backend

from abf.decode.strategy.threshold import Threshold
from abf.diffusion.head import head_nll
from abf.model.attention import CacheAttend
from abf.model.cache import KVCache
from tests.decode import tiny
from tests.diffusion.rows import V, tiny_model


def decoded(backend: Backend) -> list[torch.Tensor]:
    """States of two requests: a prompt each, a block that is not kept, one that is written."""
    model = tiny_model(dtype=torch.float32)
    cache = KVCache(model.config, 2, capacity=4)
    generator = torch.Generator().manual_seed(0)
    found = []
    for sizes, own, kept in (((9, 3), "causal", 1), ((2, 5), "block", 0), ((2, 5), "causal", 1)):
        lengths = torch.tensor(sizes)
        ids = torch.randint(V, (2, max(sizes)), generator=generator)
        positions = cache.lengths[:, None] + torch.arange(max(sizes))
        attend = CacheAttend(cache, query_lengths=lengths, own=own, backend=backend)
        with torch.no_grad():
            states = model.hidden(ids, positions, attend)
        found += [states[row, :size] for row, size in enumerate(sizes)]
        cache.commit(lengths * kept)
    return found


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_decoding(backend: Backend) -> None:
    for one, other in zip(decoded(backend), decoded("tiles"), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_engine(backend: Backend, tmp_path: Path) -> None:
    """Attention, proposals and audit of whole blocks."""
    model, samples = tiny.tiny_model(), []
    for name in (backend, "tiles"):
        engine = tiny.tiny_engine(model, Threshold(0.5), backend=name)
        prompts = tiny.tiny_prompts(2)
        samples.append(tiny.tiny_decode(tmp_path / name, engine, prompts, new_tokens=12))
    for one, other in zip(*samples, strict=True):
        assert one.token_ids.tolist() == other.token_ids.tolist()
        np.testing.assert_allclose(one.log_probs, other.log_probs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_the_head_of_a_model(backend: Backend) -> None:
    matrix = tiny_model(dtype=torch.float32).head_weight
    states = torch.randn(40, matrix.shape[1], generator=torch.Generator().manual_seed(1))
    target = torch.arange(40) % V
    runs = []
    for name in (backend, "tiles"):
        leaves = states.clone().requires_grad_(), matrix.detach().clone().requires_grad_()
        total, nats = head_nll(*leaves, target, backend=name)
        runs.append((total, nats, *torch.autograd.grad(total, leaves)))
    for one, other in zip(*runs, strict=True):
        torch.testing.assert_close(one, other)
