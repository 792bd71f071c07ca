"""Llama 2 and 3, SmolLM and SmolLM2, and what others store as a Llama."""

from __future__ import annotations

from abf.model.families.base import Family

FAMILY = Family(
    name="llama",
    architecture="LlamaForCausalLM",
    prefix="model.",
    modules={
        "embed_tokens": ("embedding",),
        "layers.*.input_layernorm": ("layers.*.attention_norm",),
        "layers.*.self_attn.q_proj": ("layers.*.attention.q",),
        "layers.*.self_attn.k_proj": ("layers.*.attention.k",),
        "layers.*.self_attn.v_proj": ("layers.*.attention.v",),
        "layers.*.self_attn.o_proj": ("layers.*.attention.o",),
        "layers.*.post_attention_layernorm": ("layers.*.mlp_norm",),
        "layers.*.mlp.gate_proj": ("layers.*.mlp.gate",),
        "layers.*.mlp.up_proj": ("layers.*.mlp.up",),
        "layers.*.mlp.down_proj": ("layers.*.mlp.down",),
        "norm": ("norm",),
    },
    keys={
        "vocab_size": "vocab_size",
        "d_model": "hidden_size",
        "d_ff": "intermediate_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "max_positions": "max_position_embeddings",
        "norm_eps": "rms_norm_eps",
        "tie_embeddings": "tie_word_embeddings",
        "qkv_bias": "attention_bias",
        "out_bias": "attention_bias",
        "mlp_bias": "mlp_bias",
    },
    defaults={
        "num_key_value_heads": None,
        "head_dim": None,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    only={"hidden_act": "silu"},
)
