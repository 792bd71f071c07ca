"""Memory that nobody has written holds NaN: whatever reads it shows."""

from __future__ import annotations

import math

import pytest
import torch


def poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what torch allocates without a value with NaN."""

    def poisoned(allocate):
        def wrapper(*args, **kwargs):
            tensor = allocate(*args, **kwargs)
            return tensor.fill_(math.nan) if tensor.is_floating_point() else tensor

        return wrapper

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
        (torch.Tensor, "new_empty_strided"),
    ):
        monkeypatch.setattr(owner, name, poisoned(getattr(owner, name)))
