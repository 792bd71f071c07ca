"""The layers of `abf.model.transformer`: norms, attention's projections, MLPs.

Letters: B batch rows, M query rows, R rows that ask, H/G query/kv heads, D head dim, d width.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from abf.model.attention import Attend
from abf.model.config import ModelConfig
from abf.model.rope import rotate


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, in at least fp32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


def norm(config: ModelConfig) -> nn.Module:
    """Norm over the residual stream."""
    kind = {"rms": RMSNorm, "layer": nn.LayerNorm}[config.norm]
    return kind(config.d_model, config.norm_eps)


class Attention(nn.Module):
    """Projections around the attention seam."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q = nn.Linear(config.d_model, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k = nn.Linear(config.d_model, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v = nn.Linear(config.d_model, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o = nn.Linear(config.heads * config.head_dim, config.d_model, bias=config.out_bias)
        self.q_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.norm_eps) if config.qk_norm else None

    def mix(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend, rows: Tensor | None
    ) -> Tensor:
        """[B, M, d] -> [B, M, H*D] before the output projection; [1, R, H*D] if only `rows` ask."""
        B, M, _ = x.shape
        asking = x if rows is None else x.index_select(1, rows)
        q = self.q(asking).view(B, -1, self.heads, self.head_dim)
        k = self.k(x).view(B, M, self.kv_heads, self.head_dim)
        v = self.v(x).view(B, M, self.kv_heads, self.head_dim)
        if self.q_norm is not None and self.k_norm is not None:
            # Norms answer in fp32 under autocast; the seam and the cache want one dtype.
            q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        k = rotate(k, cos, sin)
        if rows is not None:
            cos, sin = cos[:, rows], sin[:, rows]
            attend = functools.partial(attend, rows=rows)
        q = rotate(q, cos, sin)
        mixed = attend(layer, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))
        return mixed.transpose(1, 2).reshape(B, -1, self.heads * self.head_dim)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class GeluMLP(nn.Module):
    """down(gelu(up(x))), GELU in its tanh form (`gelu_new` of GPT-2)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.d_model, config.d_ff, bias=config.mlp_bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=config.mlp_bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.gelu(self.up(x), approximate="tanh"))


class Layer(nn.Module):
    """Pre-norm attention and MLP, each added to the residual stream."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.attention_norm = norm(config)
        self.attention = Attention(config)
        self.mlp_norm = norm(config)
        self.mlp = {"swiglu": SwiGLU, "gelu": GeluMLP}[config.mlp](config)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, layer: int, attend: Attend, rows: Tensor | None
    ) -> Tensor:
        """[B, M, d] -> [B, M, d], or [R, d] for the flat rows in `rows`."""
        # Of several batch rows, each would have its own number of queries.
        asking = rows if len(x) == 1 else None
        mixed = self.attention.mix(self.attention_norm(x), cos, sin, layer, attend, asking)
        if rows is not None:
            x, mixed = x.flatten(0, 1)[rows], mixed.flatten(0, 1)
            mixed = mixed[rows] if asking is None else mixed
        x = x + self.attention.o(mixed)
        return x + self.mlp(self.mlp_norm(x))
