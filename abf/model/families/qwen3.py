"""Qwen3 (dense): a Llama whose query and key heads are normed before they are turned."""

from __future__ import annotations

from dataclasses import replace

from abf.model.families.llama import FAMILY as LLAMA
from abf.model.families.qwen2 import FAMILY as QWEN2

FAMILY = replace(
    QWEN2,
    name="qwen3",
    architecture="Qwen3ForCausalLM",
    modules=LLAMA.modules
    | {
        "layers.*.self_attn.q_norm": ("layers.*.attention.q_norm",),
        "layers.*.self_attn.k_norm": ("layers.*.attention.k_norm",),
    },
    keys={field: key for field, key in LLAMA.keys.items() if field != "mlp_bias"},
    defaults=QWEN2.defaults | {"head_dim": 128, "attention_bias": False},
    fixed={"qk_norm": True},
)
