"""Which column a slot came from: posterior over all alignments of a text with the finished block.

The columns are hidden: the text "a MASK" of the block "a b c" may lack b or c. Given the text, each
slot belongs to a column with a probability, and each gap lacks a number of columns in expectation.
Both follow from one forward-backward pass over (column, slot).

Letters: B blocks, n columns of the longest, m slots of the longest. Everything is float64.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from abf.diffusion.path.law import Statuses


@dataclass(frozen=True)
class Alignment:
    """Slots against columns; of one alignment (ones and zeros) or in expectation over all."""

    column: Tensor
    """[B, m, n] probability that a slot came from a column; rows of slots that exist sum to one."""
    absent: Tensor
    """[B, m+1] columns that are missing in a gap; gap k lies before slot k."""


def posterior(
    clean: Tensor,
    columns: Tensor,
    text: Tensor,
    slots: Tensor,
    statuses: Statuses,
    *,
    mask_id: int,
) -> Alignment:
    """Expectation over all alignments given the text.

    Args:
        clean: [B, n] finished tokens.
        columns: [B] how many of them.
        text: [B, m] tokens and MASKs at some time.
        slots: [B] how many of them.
        statuses: [B] each, probabilities at that time.
        mask_id: id of MASK.
    """
    B, n = clean.shape
    m = text.shape[1]
    logs = {
        name: torch.log(getattr(statuses, name).double())[:, None]
        for name in ("absent", "masked", "wrong", "clean")
    }
    equal = text[:, None, :] == clean[:, :, None]
    emit = torch.where(equal, logs["clean"][..., None], logs["wrong"][..., None])
    emit = torch.where((text == mask_id)[:, None, :], logs["masked"][..., None], emit)  # [B, n, m]
    emit = emit.masked_fill(torch.arange(m)[None, None, :] >= slots[:, None, None], -torch.inf)
    real = torch.arange(n)[None, :] < columns[:, None]

    def shifted(values: Tensor, by: int) -> Tensor:
        """Values of the slot before (1) or after (-1); nothing beyond the ends."""
        out = values.roll(by, dims=1)
        out[:, 0 if by > 0 else -1] = -torch.inf
        return out

    padding = torch.full((B, 1), -torch.inf, dtype=torch.float64)
    forward = torch.full((B, n + 1, m + 1), -torch.inf, dtype=torch.float64)
    forward[:, 0, 0] = 0.0
    for i in range(n):
        here = forward[:, i]
        held = shifted(here + torch.cat((emit[:, i], padding), dim=1), 1)
        step = torch.logaddexp(here + logs["absent"], held)
        forward[:, i + 1] = torch.where(real[:, i, None], step, here)
    backward = torch.full((B, n + 1, m + 1), -torch.inf, dtype=torch.float64)
    backward[torch.arange(B), n, slots] = 0.0
    for i in reversed(range(n)):
        after = backward[:, i + 1]
        held = shifted(after, -1) + torch.cat((emit[:, i], padding), dim=1)
        step = torch.logaddexp(after + logs["absent"], held)
        backward[:, i] = torch.where(real[:, i, None], step, after)

    total = forward[torch.arange(B), n, slots][:, None, None]
    assert torch.isfinite(total).all(), "the text cannot come from the finished block"
    column = forward[:, :n, :m] + emit + backward[:, 1:, 1:] - total
    missing = forward[:, :n] + logs["absent"][..., None] + backward[:, 1:] - total
    column = column.masked_fill(~real[..., None], -torch.inf)
    missing = missing.masked_fill(~real[..., None], -torch.inf)
    return Alignment(column.exp().transpose(1, 2), missing.exp().sum(dim=1))


def one_alignment(present: Tensor, real: Tensor, *, slots: int) -> Alignment:
    """The alignment that is known where a text was drawn.

    Args:
        present: [B, n] bool, columns that are in the text.
        real: [B, n] bool, columns that exist at all; the others pad shorter blocks.
        slots: m, slots of the longest text.
    """
    B, n = present.shape
    present = present & real
    place = present.cumsum(dim=1) - present.long()  # slot of a present column; gap of another
    column = torch.zeros(B, slots + 1, n, dtype=torch.float64)
    absent = torch.zeros(B, slots + 1, dtype=torch.float64)
    column.scatter_(1, torch.where(present, place, slots)[:, None, :], 1.0)
    absent.scatter_add_(1, place, (~present & real).double())
    return Alignment(column[:, :slots], absent)
