"""The forward pass of a micro-batch: own drafts, a teacher's word, and the loss.

Letters: B batch rows.
"""

from __future__ import annotations

import contextlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig
from abf.diffusion.corrupt.base import Noised
from abf.diffusion.corrupt.path import PathNoised
from abf.diffusion.guide import teach
from abf.diffusion.loss import loss_terms
from abf.diffusion.policy.own import write_own
from abf.diffusion.terms import Term, combine, term_weights
from abf.model.transformer import Transformer
from abf.train.config import TrainConfig
from abf.train.recompute import recomputed


class Losses(nn.Module):
    """The forward pass of a micro-batch as one module: the root that shards are gathered for."""

    def __init__(self, model: Transformer, cfg: TrainConfig, loss: LossConfig | None) -> None:
        super().__init__()
        self.model, self.cfg, self.loss = model, cfg, loss
        self.teacher: list[Transformer] = []
        """The model as it was, once it teaches; in a list, so that it is no part of this module."""

    def forward(
        self,
        batch: PackedBatch,
        noised: Noised | PathNoised | None,
        counts: dict[str, int],
        only: tuple[str, ...] | None,
        keys: tuple[int, NDArray[np.int64]],
        taught: PackedBatch | None,
    ) -> tuple[Tensor, dict[str, Term], Noised | PathNoised | None]:
        """Loss to differentiate, its terms, and the rows they are of.

        Args:
            batch: clean rows.
            noised: as the corruption leaves them; the model writes its own drafts here.
            counts: global ones.
            only: terms to compute; all by default.
            keys: seed of the run, and [B] how often each row was seen before.
            taught: the rows in the teacher's blocks, if there is a teacher.
        """
        cfg, model = self.cfg, self.model
        if isinstance(noised, PathNoised) and self.loss is not None:
            # A pass of its own: autocast would keep weights cast without a gradient.
            with self._lower():
                noised = write_own(
                    model, batch, noised, loss=self.loss, backend=cfg.attention, seed=keys[0],
                    epochs=keys[1],
                )  # fmt: skip
        guide = None
        if taught is not None and isinstance(noised, Noised) and self.loss is not None:
            with self._lower():
                guide = teach(
                    self.teacher[0], taught, noised, loss=self.loss, backend=cfg.attention,
                    top=self.loss.distil_top,
                )  # fmt: skip
        again = recomputed(model) if cfg.checkpoint_activations else contextlib.nullcontext()
        with self._lower(), again:
            terms = loss_terms(
                model, batch, noised=noised, loss=self.loss, backend=cfg.attention, only=only,
                guide=guide,
            )  # fmt: skip
            loss = combine(terms, counts, term_weights(self.loss))
        return loss, terms, noised

    def _lower(self) -> torch.autocast:
        device = self.model.head_weight.device.type
        return torch.autocast(device, torch.bfloat16, enabled=self.cfg.precision == "bf16")
