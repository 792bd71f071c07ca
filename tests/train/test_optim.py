"""Learning rates by hand, and AdamW on the flat buffer against torch's own on plain gradients."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from abf.errors import ResumeError
from abf.train.config import OptimConfig
from abf.train.optim import Optimiser, learning_rate


def rates(cfg: OptimConfig, steps: int) -> list[float]:
    return [learning_rate(step, steps=steps, cfg=cfg) for step in range(steps)]


def test_linear_schedule_by_hand() -> None:
    cfg = OptimConfig(lr=1.0, schedule="linear", warmup_fraction=0.4, final_fraction=0.0)
    # T = 10, W = 4: up in quarters, then (9 - s) / (9 - 4).
    assert rates(cfg, 10) == pytest.approx([0.25, 0.5, 0.75, 1, 1, 0.8, 0.6, 0.4, 0.2, 0])


def test_cosine_schedule_by_hand() -> None:
    cfg = OptimConfig(lr=2.0, schedule="cosine", warmup_fraction=0.0, final_fraction=0.1)
    # T = 5: share (1 + cos(pi * s / 4)) / 2 = 1, .853553, .5, .146447, 0 of the way down to 0.1.
    expected = [2.0, 2 * (0.1 + 0.9 * 0.8535534), 1.1, 2 * (0.1 + 0.9 * 0.1464466), 0.2]
    assert rates(cfg, 5) == pytest.approx(expected, rel=1e-6)


def test_constant_schedule_and_single_step() -> None:
    cfg = OptimConfig(lr=0.5, schedule="constant", warmup_fraction=0.5)
    assert rates(cfg, 4) == [0.25, 0.5, 0.5, 0.5]
    assert rates(OptimConfig(lr=0.5), 1) == [0.5]


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
def test_last_step_has_the_final_share(schedule: str) -> None:
    cfg = OptimConfig.model_validate({"lr": 3e-4, "schedule": schedule, "final_fraction": 0.05})
    for steps in (2, 7, 100, 1001):
        found = rates(cfg, steps)
        assert found[-1] == pytest.approx(0.05 * 3e-4)
        assert max(found) == pytest.approx(3e-4)


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.LayerNorm(7), nn.Linear(7, 3, bias=False))


def gradients(model: nn.Module, seed: int) -> None:
    x = torch.randn(11, 5, generator=torch.Generator().manual_seed(seed))
    model(x).square().sum().backward()


def test_updates_equal_torch_adamw_with_clipping_and_groups() -> None:
    ours, theirs = small_model(), small_model()
    cfg = OptimConfig(lr=0.05, clip_norm=0.5, weight_decay=0.3)
    optimiser = Optimiser(ours, cfg)
    oracle = torch.optim.AdamW(
        [
            {"params": [p for p in theirs.parameters() if p.ndim > 1], "weight_decay": 0.3},
            {"params": [p for p in theirs.parameters() if p.ndim == 1], "weight_decay": 0.0},
        ],
        betas=(0.9, 0.95),
    )
    for step in range(5):
        lr = 0.05 / (step + 1)
        optimiser.zero_grad()
        gradients(ours, step)
        oracle.zero_grad()
        gradients(theirs, step)
        norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        for group in oracle.param_groups:
            group["lr"] = lr
        oracle.step()
        assert optimiser.clip() == pytest.approx(float(norm), rel=1e-5)
        optimiser.step(lr)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-5, atol=2e-6)


def test_small_gradients_are_not_scaled() -> None:
    model = small_model()
    optimiser = Optimiser(model, OptimConfig(clip_norm=1e9))
    gradients(model, 0)
    before = optimiser.gradients.clone()
    optimiser.clip()
    assert torch.equal(before, optimiser.gradients)


def test_gradients_accumulate_until_they_are_zeroed() -> None:
    model = small_model()
    optimiser = Optimiser(model, OptimConfig())
    gradients(model, 0)
    once = optimiser.gradients.clone()
    gradients(model, 0)
    torch.testing.assert_close(optimiser.gradients, 2 * once)
    optimiser.zero_grad()
    assert not optimiser.gradients.any()


def test_state_goes_into_a_fresh_optimiser_bit_for_bit() -> None:
    ours, fresh = small_model(), small_model()
    first = Optimiser(ours, OptimConfig())
    for step in range(3):
        first.zero_grad()
        gradients(ours, step)
        first.step(0.01)
    fresh.load_state_dict(ours.state_dict())
    second = Optimiser(fresh, OptimConfig())
    assert second.state() == {}
    second.load(first.state())
    for model, optimiser in ((ours, first), (fresh, second)):
        optimiser.zero_grad()
        gradients(model, 9)
        optimiser.step(0.02)
    assert all(
        torch.equal(a, b) for a, b in zip(ours.parameters(), fresh.parameters(), strict=True)
    )
    assert first.state().keys() == second.state().keys()
    assert all(torch.equal(a, second.state()[name]) for name, a in first.state().items())


def test_state_of_another_model_is_refused_by_name() -> None:
    optimiser = Optimiser(small_model(), OptimConfig())
    with pytest.raises(ResumeError, match=r"0\.bias\.exp_avg"):
        optimiser.load({})
