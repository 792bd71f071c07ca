"""What was found out about a tensor, kept as long as the tensor lives and is not written to.

A step's ranges are the same tensor in every layer; checking them makes the host wait for the GPU.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

T = TypeVar("T")


class Memo(Generic[T]):
    """Values by tensor (the object, not its contents) and one integer."""

    def __init__(self) -> None:
        self._found = WeakIdKeyDictionary()

    def get(self, tensor: Tensor, number: int, find: Callable[[], T]) -> T:
        """What `find` returned for this very tensor since it was last written to, or returns now.

        Nothing is remembered of tensors made in inference mode, which do not count writes, nor
        while a CUDA graph is captured: replays find other contents, and must find out themselves.
        A value must not hold the tensor itself, which would then live for ever.
        """
        if tensor.is_inference() or (tensor.is_cuda and torch.cuda.is_current_stream_capturing()):
            return find()
        key = (tensor._version, number)
        known = self._found.get(tensor)
        if known is None or known[0] != key:
            known = (key, find())
            self._found[tensor] = known
        return known[1]
