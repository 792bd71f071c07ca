"""Qwen2 and Qwen2.5: a Llama whose queries, keys and values have biases.

Sliding windows, which few of them use, are as in `mistral.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from abf.model.families.llama import FAMILY as LLAMA


def window(found: Mapping[str, Any]) -> int | None:
    """Span of the sliding window if any layer has one: by `layer_types`, or the upper layers."""
    kinds = found.get("layer_types")
    if kinds is None:
        upper = found["num_hidden_layers"] > found["max_window_layers"]
        return found["sliding_window"] if found["use_sliding_window"] and upper else None
    return found["sliding_window"] if any(kind != "full_attention" for kind in kinds) else None


FAMILY = replace(
    LLAMA,
    name="qwen2",
    architecture="Qwen2ForCausalLM",
    keys={field: key for field, key in LLAMA.keys.items() if not field.endswith("_bias")},
    defaults={
        "num_key_value_heads": 32,
        "head_dim": None,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "sliding_window": 4096,
        "max_window_layers": 28,
    },
    fixed={"qkv_bias": True},
    window=window,
)
