"""Attention over a union of keys from attention over its parts."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(out1: Tensor, lse1: Tensor, out2: Tensor, lse2: Tensor) -> tuple[Tensor, Tensor]:
    """out = Σ e^(λ_i - λ) o_i with λ = log Σ e^λ_i; 0 and -inf where no part sees anything."""
    lse = torch.logaddexp(lse1, lse2)
    nothing = lse == -torch.inf
    base = lse.masked_fill(nothing, 0.0)
    weight1, weight2 = (lse1 - base).exp(), (lse2 - base).exp()
    return out1 * weight1.unsqueeze(-1) + out2 * weight2.unsqueeze(-1), lse
