"""Rotary positions: how fast each pair of a head turns, and turning them.

Letters: B batch rows, M rows, D head dim.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from abf.model.config import LinearScaling, Llama3Scaling, ModelConfig, YarnScaling


def rope_frequencies(config: ModelConfig) -> Tensor:
    """Angular speed of each rotated pair, [D/2], radians a position.

    Scaled RoPE slows waves longer than the original context by `factor`, keeps short ones and
    blends between (names and formulas as in Hugging Face configs). A model with learned positions
    turns nothing: its speeds are zero.
    """
    if config.positions == "learned":
        return torch.zeros(config.head_dim // 2)
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float()
    speed = 1.0 / (config.rope_theta ** (pairs / config.head_dim))
    scaling = config.rope_scaling
    if scaling is None:
        return speed
    if isinstance(scaling, LinearScaling):
        return speed / scaling.factor
    if isinstance(scaling, Llama3Scaling):
        kept = _llama3_kept(speed, scaling)
    else:
        kept = _yarn_kept(len(speed), config.rope_theta, scaling)
    return (1 - kept) * speed / scaling.factor + kept * speed


def rope_stretch(config: ModelConfig) -> float:
    """How much longer turning makes queries and keys: 1, but for YaRN."""
    scaling = config.rope_scaling
    return scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0


def _llama3_kept(speed: Tensor, scaling: Llama3Scaling) -> Tensor:
    """Share of each pair's own speed that is kept: 1 for short waves, 0 for long ones."""
    wavelength = 2 * math.pi / speed
    blend = (scaling.original_max_position_embeddings / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return blend.clamp(0, 1)


def _yarn_kept(pairs: int, theta: float, scaling: YarnScaling) -> Tensor:
    """As `_llama3_kept`, falling linearly over pairs rather than over frequencies.

    Pairs that turn more than `beta_fast` times in the original context keep their speed, those that
    turn less than `beta_slow` times lose it.
    """

    def turning(rotations: float) -> float:
        """The pair (a fraction) that turns so many times in the original context."""
        context = scaling.original_max_position_embeddings
        return pairs * math.log(context / (rotations * 2 * math.pi)) / math.log(theta)

    first, last = turning(scaling.beta_fast), turning(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    if first == last:
        last += 0.001  # as Hugging Face does; a step instead of a division by zero
    ramp = (torch.arange(pairs, dtype=torch.float32) - first) / (last - first)
    return 1 - ramp.clamp(0, 1)


def rotation(positions: Tensor, speed: Tensor, *, stretch: float = 1.0) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines [B, M, 1, D] of positions [B, M], times `stretch`, for `rotate`."""
    angles = (positions.unsqueeze(-1).to(speed.dtype) * speed).unsqueeze(2)
    cos, sin = angles.cos(), angles.sin()
    if stretch != 1.0:
        cos, sin = cos * stretch, sin * stretch
    return torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn pairs (i, i + D/2) of x [B, M, heads, D]; computed in fp32, returned in x's dtype."""
    return (x * cos + x.roll(x.shape[-1] // 2, dims=-1) * sin).to(x.dtype)
