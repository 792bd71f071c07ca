"""Draws against the distribution they come from."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from abf.decode.config import SamplerConfig
from abf.decode.sampler import ALTERNATIVES, draw, propose

N = 20_000
GRID = torch.from_numpy((np.arange(N) + 0.5) / N)
"""Evenly spread numbers: frequencies are then exact to 1/N a token."""


def frequencies(logits: torch.Tensor, cfg: SamplerConfig) -> torch.Tensor:
    tokens = draw(logits.expand(N, -1), cfg, GRID)
    return torch.bincount(tokens, minlength=len(logits)).double() / N


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_the_softmax(temperature: float) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(0)) * 3
    wanted = torch.softmax(logits.double() / temperature, 0)
    found = frequencies(logits, SamplerConfig(temperature=temperature))
    assert (found - wanted).abs().max() <= 2 / N


def test_top_p_keeps_the_smallest_nucleus() -> None:
    probs = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15])
    found = frequencies(probs.log(), SamplerConfig(temperature=1.0, top_p=0.65))
    wanted = torch.tensor([0.0, 0.4, 0.0, 0.3, 0.0], dtype=torch.float64) / 0.7
    assert (found - wanted).abs().max() <= 2 / N
    only = frequencies(probs.log(), SamplerConfig(temperature=1.0, top_p=0.01))
    assert only.tolist() == [0, 1, 0, 0, 0]


def test_an_impossible_token_is_never_drawn() -> None:
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf")]]).expand(3, -1)
    ends = torch.tensor([0.0, 0.5, 1 - 2.0**-53], dtype=torch.float64)
    assert draw(logits, SamplerConfig(temperature=1.0), ends).tolist() == [1, 1, 1]


def test_proposals_show_the_model_whatever_the_temperature() -> None:
    logits = torch.tensor([[2.0, 0.0, 1.0, float("-inf"), -1.0]])
    probs = torch.softmax(logits.double(), -1)[0].numpy()
    greedy = propose(logits, SamplerConfig(), None)
    hot = propose(logits, SamplerConfig(temperature=5.0), np.array([0.99]))
    assert greedy.token.tolist() == [0]
    assert hot.token.tolist() == [4]
    for found in (greedy, hot):
        assert np.allclose(found.confidence, probs[found.token])
        assert np.allclose(found.entropy, -sum(p * np.log(p) for p in probs if p > 0))
        assert found.top_ids[0].tolist() == [0, 2, 1, 4]
        assert np.allclose(found.top_probs[0], probs[found.top_ids[0]])
        assert np.allclose(found.margin(), probs[0] - probs[2])


def test_a_vocabulary_smaller_than_the_alternatives() -> None:
    found = propose(torch.tensor([[0.0, 1.0]]), SamplerConfig(), None)
    assert found.top_ids.shape == (1, 2)
    assert ALTERNATIVES > 2
    single = propose(torch.zeros(1, 1), SamplerConfig(), None)
    assert single.margin().tolist() == [1.0]
