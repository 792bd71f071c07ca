"""Bytes that tensors hold, exactly: every storage that an operator makes, until it is freed."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """Watches the storages that come to be inside; what existed before counts for nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        """Bytes now, and at most."""
        self.largest: tuple[int, tuple[int, ...]] = (0, ())
        """Elements and shape of the largest tensor that was made."""
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run the operator, and take in what it made."""
        inputs = {
            leaf.untyped_storage()._cdata
            for leaf in tree_leaves((args, kwargs))
            if isinstance(leaf, torch.Tensor)
        }
        found = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(found):
            if isinstance(leaf, torch.Tensor):
                self._take(leaf, inputs)
        return found

    def _take(self, tensor: torch.Tensor, inputs: set[int]) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known or key in inputs:
            return
        self._known[key] = weakref.finalize(storage, self._free, key, size)
        self.live += size
        self.peak = max(self.peak, self.live)
        elements = size // max(tensor.element_size(), 1)
        self.largest = max(self.largest, (elements, tuple(tensor.shape)))

    def _free(self, key: int, size: int) -> None:
        self._known.pop(key, None)
        self.live -= size
