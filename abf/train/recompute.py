"""Activation checkpointing: layers computed again in the backward pass, to save memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from torch import Tensor
from torch.utils.checkpoint import checkpoint

from abf.model.transformer import Transformer


@contextlib.contextmanager
def recomputed(model: Transformer) -> Iterator[None]:
    """Forward passes inside keep only the layers' inputs; backward computes the layers again."""

    def again(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *inputs: checkpoint(forward, *inputs, use_reentrant=False)

    for layer in model.layers:
        layer.forward = again(layer.forward)
    try:
        yield
    finally:
        for layer in model.layers:
            del layer.forward  # the class's own again
