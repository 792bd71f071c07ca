"""A random model whose greedy text varies, prompts, and a decode with its log.

V vocabulary, S longest block; the document token is 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abf.base import build
from abf.decode.config import FixedExtent, SamplerConfig
from abf.decode.engine import Engine
from abf.decode.request import Prompt, Sample
from abf.decode.trace import TraceWriter
from abf.decode.view import Strategy
from abf.model.config import ModelConfig
from abf.model.store import with_edit_heads
from abf.model.transformer import Transformer

V, S = 97, 12


def tiny_model(*, seed: int = 0, scale: float = 16.0, **changes: Any) -> Transformer:
    """Large weights make confident, varied text; the document token turns up in some of it."""
    torch.set_num_threads(1)
    shape: dict[str, Any] = {
        "vocab_size": V, "d_model": 32, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 8,
        "d_ff": 64, "max_block": S, "max_positions": 160, "tie_embeddings": False,
    }  # fmt: skip
    config = ModelConfig(**(shape | changes))
    model = Transformer(config)
    model.initialise(torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(scale)
        model.length_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
    return model.eval()


def edit_model(
    *, seed: int = 0, busy: float = 1.0, model: Transformer | None = None
) -> Transformer:
    """A tiny model with edit heads that ask for every operation now and then."""
    model = with_edit_heads(tiny_model(seed=seed) if model is None else model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        model.edit_head.weight.normal_(0, 0.5 * busy, generator=generator)
        model.edit_head.bias.zero_()
        model.end_embedding.normal_(0, 3, generator=generator)
    return model.eval()


def tiny_prompts(count: int = 6, *, seed: int = 0) -> list[Prompt]:
    """Prompts of different lengths, an empty one among them, in blocks of three."""
    rng = np.random.default_rng(seed)
    return [Prompt(i, f"text-{i}", rng.integers(1, V, size=3 * i), (3,) * i) for i in range(count)]


def header(requests: int, **more: str) -> dict[str, str]:
    """Metadata of a log."""
    return {"mask_id": str(V), "document_id": "0", "requests": str(requests)} | more


def tiny_engine(model: Transformer, strategy: Strategy, **changes: Any) -> Engine:
    """An engine with blocks of 6, greedy, shifted read-out, unless told otherwise."""
    settings: dict[str, Any] = {
        "extent": build(FixedExtent(length=6), room="abf.decode.extent"),
        "sampler": SamplerConfig(),
        "shift": True,
        "seed": 0,
    }
    return Engine(model, strategy=strategy, **(settings | changes))


def tiny_decode(
    path: Path, engine: Engine, prompts: Sequence[Prompt], *, new_tokens: int = 30
) -> list[Sample]:
    """Samples; the log is at `path`."""
    with TraceWriter(path, header(len(prompts))) as trace:
        return engine.run(prompts, new_tokens=new_tokens, trace=trace)
