"""Where the tensors of a pass live: on the device of the model's weights."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class OnDevice(Protocol):
    """What has weights somewhere."""

    @property
    def head_weight(self) -> Tensor: ...


M = TypeVar("M", bound=OnDevice)


def on_its_device(
    function: Callable[Concatenate[M, P], R],
) -> Callable[Concatenate[M, P], R]:
    """A function of a model, inside which new tensors appear beside its weights.

    `torch.arange`, `torch.as_tensor` and the like then need not be told; `torch.from_numpy` stays
    on the processor.
    """

    @functools.wraps(function)
    def there(model: M, *args: P.args, **kwargs: P.kwargs) -> R:
        device = model.head_weight.device
        # On the processor they appear anyway, and the context costs a little at every call.
        inside: Any = contextlib.nullcontext() if device.type == "cpu" else device
        with inside:
            return function(model, *args, **kwargs)

    return there
