"""GPT-2: learned positions, LayerNorm, one fused matrix for query, key and value."""

from __future__ import annotations

from abf.model.families.base import Family

FAMILY = Family(
    name="gpt2",
    architecture="GPT2LMHeadModel",
    prefix="transformer.",
    modules={
        "wte": ("embedding",),
        "wpe": ("position_embedding",),
        "h.*.ln_1": ("layers.*.attention_norm",),
        "h.*.attn.c_attn": ("layers.*.attention.q", "layers.*.attention.k", "layers.*.attention.v"),
        "h.*.attn.c_proj": ("layers.*.attention.o",),
        "h.*.ln_2": ("layers.*.mlp_norm",),
        "h.*.mlp.c_fc": ("layers.*.mlp.up",),
        "h.*.mlp.c_proj": ("layers.*.mlp.down",),
        "ln_f": ("norm",),
    },
    keys={
        "vocab_size": "vocab_size",
        "d_model": "n_embd",
        "d_ff": "n_inner",
        "layers": "n_layer",
        "heads": "n_head",
        "max_positions": "n_positions",
        "norm_eps": "layer_norm_epsilon",
        "tie_embeddings": "tie_word_embeddings",
    },
    defaults={
        "n_inner": None,
        "n_positions": 1024,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": True,
    },
    fixed={
        "norm": "layer",
        "mlp": "gelu",
        "positions": "learned",
        "qkv_bias": True,
        "out_bias": True,
        "mlp_bias": True,
    },
    only={
        "activation_function": "gelu_new",
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
    },
    transposed=True,
    # The causal mask and the score of a masked key.
    redundant=r".*\bh\.\d+\.attn\.(masked_)?bias",
)
