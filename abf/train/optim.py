"""AdamW, with the learning rate as a pure function of the step.

Steps count from 0: step s is the (s+1)-th update of T. Gradients of whole weights are views of one
flat fp32 buffer, so that the sum over ranks, the global norm and clipping are one operation each.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from abf.errors import ResumeError
from abf.train.config import OptimConfig
from abf.train.parallel import World

MOMENTS = ("exp_avg", "exp_avg_sq", "step")
"""State that AdamW keeps of each parameter."""


def learning_rate(step: int, *, steps: int, cfg: OptimConfig) -> float:
    """Learning rate of one update.

    Rises linearly over the first W = round(warmup_fraction * T) steps and reaches the peak at step
    W - 1; from step W (the peak again) it follows the schedule down to `final_fraction` of the peak
    at step T - 1.

    Args:
        step: 0-based number of the update, below `steps`.
        steps: T, updates of the whole run.
        cfg: peak, schedule, warm-up and final share.
    """
    assert 0 <= step < steps, (step, steps)
    warmup = round(cfg.warmup_fraction * steps)
    if step < warmup:
        return cfg.lr * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - 1 - warmup)
    if cfg.schedule == "constant":
        share = 1.0
    elif cfg.schedule == "linear":
        share = 1 - progress
    else:
        share = 0.5 * (1 + math.cos(math.pi * progress))
    if cfg.schedule == "constant":
        return cfg.lr
    return cfg.lr * (cfg.final_fraction + (1 - cfg.final_fraction) * share)


class Optimiser:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101); weight decay on matrices only.

    Every trainable parameter takes part in every step, with a zero gradient where the objective
    does not reach it: ranks then always agree on what they sum.
    """

    def __init__(self, model: nn.Module, cfg: OptimConfig) -> None:
        self.cfg = cfg
        self.parameters: dict[str, nn.Parameter] = {
            name: parameter for name, parameter in model.named_parameters()
        }
        """Trainable parameters by name; tied ones once."""
        assert all(p.dtype == torch.float32 for p in self.parameters.values())
        self._hold_gradients()
        matrices = [p for p in self.parameters.values() if p.ndim >= 2]
        vectors = [p for p in self.parameters.values() if p.ndim < 2]
        self._adamw = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": cfg.weight_decay},
                {"params": vectors, "weight_decay": 0.0},
            ],
            lr=cfg.lr,
            betas=cfg.betas,
            fused=True,
        )

    def _hold_gradients(self) -> None:
        sizes = [parameter.numel() for parameter in self.parameters.values()]
        self.gradients = torch.cat([p.new_zeros(p.numel()) for p in self.parameters.values()])
        """Flat buffer; each parameter's `.grad` is a view of it."""
        for parameter, view in zip(
            self.parameters.values(), self.gradients.split(sizes), strict=True
        ):
            parameter.grad = view.view_as(parameter)

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        self.gradients.zero_()

    def sum_gradients(self, world: World) -> None:
        """Replace the gradients by their sums over the ranks."""
        world.sum_(self.gradients)

    def clip(self) -> float:
        """Scale the gradients to at most `clip_norm`; returns the norm before (may be inf, NaN)."""
        norm = float(torch.linalg.vector_norm(self.gradients))
        if norm > self.cfg.clip_norm and math.isfinite(norm):
            self.gradients.mul_(self.cfg.clip_norm / norm)
        return norm

    def step(self, lr: float) -> None:
        """Apply one update."""
        for group in self._adamw.param_groups:
            group["lr"] = lr
        self._adamw.step()

    def state(self) -> dict[str, Tensor]:
        """AdamW's state, `{parameter}.{moment}` -> tensor; empty before the first step."""
        return {
            f"{name}.{moment}": self._adamw.state[parameter][moment]
            for name, parameter in self.parameters.items()
            if parameter in self._adamw.state
            for moment in MOMENTS
        }

    def blank(self) -> dict[str, Tensor]:
        """Zeros in the shapes of `state`, to read a saved one into."""
        return {
            f"{name}.{moment}": torch.zeros(()) if moment == "step" else torch.zeros_like(parameter)
            for name, parameter in self.parameters.items()
            for moment in MOMENTS
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over a state written by `state`, as copies.

        Raises:
            ResumeError: it belongs to a model with other parameters; names them.
        """
        expected = {f"{name}.{moment}" for name in self.parameters for moment in MOMENTS}
        if different := sorted(expected ^ state.keys()):
            raise ResumeError(
                f"the optimiser state has other parameters than the model: {different[:6]}"
                f"{' ...' if len(different) > 6 else ''}"
            )
        for name, parameter in self.parameters.items():
            self._adamw.state[parameter] = {
                moment: state[f"{name}.{moment}"].clone() for moment in MOMENTS
            }
