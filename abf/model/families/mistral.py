"""Mistral. Version 0.1 attends to the last 4096 positions only (`sliding_window`).

Within the window that is plain causal attention, which is what the transformer computes; longer
rows and contexts are refused.
"""

from __future__ import annotations

from dataclasses import replace

from abf.model.families.llama import FAMILY as LLAMA

FAMILY = replace(
    LLAMA,
    name="mistral",
    architecture="MistralForCausalLM",
    keys={field: key for field, key in LLAMA.keys.items() if not field.endswith("_bias")},
    defaults={
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
    switched_off={"sliding_window": None},
    window=lambda found: found["sliding_window"],
)
