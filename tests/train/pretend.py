"""A device that is none: its tensors hide CPU ones and refuse to meet tensors of the processor.

What a program does wrong with a GPU (a table left on the processor, a NumPy view of what is on the
device) fails here as it would there, on a machine without one, and every value can be compared. It
must be there before a process computes its first gradient, hence `tests.train.on_device`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
COPIES = {"_to_copy", "copy_"}
"""Operations that may lead from one device to the other."""


class OnDevice(Tensor):
    """A tensor on the device."""

    hidden: Tensor

    @staticmethod
    def __new__(cls, hidden: Tensor) -> OnDevice:
        made = Tensor._make_wrapper_subclass(
            cls, hidden.size(), strides=hidden.stride(), storage_offset=hidden.storage_offset(),
            dtype=hidden.dtype, device=torch.device(NAME, 0),
        )  # fmt: skip
        made.hidden = hidden
        return made

    def __repr__(self, *_: Any, **__: Any) -> str:
        return f"OnDevice({self.hidden})"

    def tolist(self) -> Any:  # PyTorch has none for subclasses
        return self.hidden.tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do an operation on what the tensors hide."""
    given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in given if isinstance(x, OnDevice)]
    wanted = kwargs.get("device")
    leads_here = bool(here) if wanted is None else torch.device(wanted).type == NAME
    if not here and not leads_here:
        return func(*args, **kwargs)
    name = func.overloadpacket.__name__
    if here and name not in COPIES:
        # As on a GPU, a single number of the processor may meet a tensor of the device.
        strangers = [x for x in given if not isinstance(x, OnDevice) and x.dim() > 0]
        if strangers:
            raise RuntimeError(f"{func}: a tensor on the processor, {tuple(strangers[0].shape)}")
    if wanted is not None:
        kwargs = kwargs | {"device": "cpu"}
    args, kwargs = tree_map_only(OnDevice, lambda x: x.hidden, (args, kwargs))
    found = func(*args, **kwargs)
    if func._schema.is_mutable:
        return given[0] if isinstance(found, Tensor) else found
    return tree_map_only(Tensor, OnDevice, found) if leads_here else found


class _Factories(TorchDispatchMode):
    """Tensors that are made on the device, or moved to it."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {})


def _made(function: Any, *args: Any, **kwargs: Any) -> OnDevice:
    return OnDevice(function(*args, **(kwargs | {"device": "cpu"})))


def _copied(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    one, other = (x.hidden if isinstance(x, OnDevice) else x for x in (source, target))
    other.copy_(one)
    return target


KERNELS = torch.library.Library("aten", "IMPL")
"""Of what PyTorch asks of a device inside other operations: a list as an index, for example."""


@functools.cache
def _register() -> None:
    _setup_privateuseone_for_python_backend(NAME)
    aten: Any = torch.ops.aten
    for name in ("empty.memory_format", "empty_strided"):
        made = functools.partial(_made, getattr(aten, name.partition(".")[0]))
        KERNELS.impl(name, made, "PrivateUse1")
    KERNELS.impl("_copy_from", _copied, "PrivateUse1")
    module: Any = getattr(torch, NAME)
    module.get_amp_supported_dtype = lambda: [torch.bfloat16]  # asked for by autocast


@contextlib.contextmanager
def pretend_device() -> Iterator[torch.device]:
    """Inside, the device exists."""
    _register()
    with _Factories():
        yield torch.device(NAME, 0)
