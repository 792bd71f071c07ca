"""Opening blocks: how long the next one is, and what it holds at first.

Letters: B requests, S longest block.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from abf.decode.batch import Batch
from abf.decode.controls import Controls
from abf.decode.view import ExtentPolicy, ExtentView
from abf.diffusion.rng import uniform
from abf.model.transformer import Transformer

EXTENT_STREAM = 1
"""First counter of the random numbers of an extent; the engine's own follow."""


class Opener:
    """Opens a block for every request without one.

    Args:
        model: has the length head.
        extent: how long a block is.
        controls: how long a block may be, and what the first must hold.
        seed: with request and block it fixes every random number.
        told: number of the granularity that the model is told, if any.
        most: longest block.
        least: fewest slots that may be opened.
    """

    def __init__(
        self,
        model: Transformer,
        extent: ExtentPolicy,
        controls: Controls,
        *,
        seed: int,
        told: int | None,
        most: int,
        least: int,
    ) -> None:
        self.model, self.extent, self.controls = model, extent, controls
        self.seed, self.told, self.most, self.least = seed, told, most, least

    def open(self, batch: Batch) -> None:
        """Open a block for every request without one."""
        opening = [
            row for row, s in enumerate(batch.requests) if s.block is None and s.closing is None
        ]
        if not opening:
            return
        probs: Sequence[NDArray[np.float64] | None] = [None] * len(opening)
        if self.extent.needs_lengths:
            before = batch.last[0][opening]
            told = None
            if self.told is not None:
                told = torch.full((len(opening),), self.told, device=before.device)
            logits = self.model.length_logits(before, told)[:, self.least :].double()
            probs = list(torch.softmax(logits, dim=-1).cpu().numpy())
        for row, length_probs in zip(opening, probs, strict=True):
            state = batch.requests[row]
            number = state.prompt.request
            view = ExtentView(
                request=number,
                block=state.blocks,
                tokens_left=state.tokens_left,
                length_probs=length_probs,
                uniform=float(uniform(EXTENT_STREAM, self.seed, number, state.blocks)),
                least=self.least,
                earlier=state.earlier(self.extent.back) if self.extent.back else None,
            )
            extent = self.extent.next_extent(view)
            length = extent.length
            assert length >= self.least, f"{type(self.extent).__name__} opened nothing"
            first = state.blocks == 0
            length = min(self.controls.length(length, first=first), state.tokens_left)
            if extent.tokens is not None:
                length = min(length, self.most)
                state.open(length, (np.arange(length), extent.tokens[:length]), lock=False)
                continue
            kept = self.controls.places(length) if first and self.controls.keep else None
            state.open(length, kept)
