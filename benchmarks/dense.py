"""The peer of the training benchmark: what published trainers of two streams do.

A dense boolean mask over torch's attention, every row in every layer, logits of all rows of both
streams; loss, noise, data and optimiser are the trainer's own. Letters: B batch rows, L row length,
V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
from abf_kernels.block_attention.reference import dense_mask
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from abf.data.loader import PackedBatch
from abf.diffusion.corrupt.base import Noised
from abf.diffusion.corrupt.path import PathNoised
from abf.diffusion.layout import length_reads, mask_reads, two_stream
from abf.diffusion.terms import Term, combine, count_terms, term_weights
from abf.model.transformer import Transformer
from abf.train.forward import Losses


class DenseLosses(Losses):
    """Masked tokens and block lengths, the plain way; shifted, no AR loss."""

    def forward(
        self,
        batch: PackedBatch,
        noised: Noised | PathNoised | None,
        counts: dict[str, int],
        only: tuple[str, ...] | None,
        keys: tuple[int, NDArray[np.int64]],
        taught: PackedBatch | None,
    ) -> tuple[Tensor, dict[str, Term], Noised | PathNoised | None]:
        """See `Losses.forward`."""
        assert isinstance(noised, Noised)
        assert self.loss is not None
        assert self.loss.shift
        assert not self.loss.ar_weight
        with torch.autocast("cpu", torch.bfloat16, enabled=self.cfg.precision == "bf16"):
            terms = self._terms(self.model, batch, noised)
            return combine(terms, counts, term_weights(self.loss)), terms, noised

    def _terms(self, model: Transformer, batch: PackedBatch, noised: Noised) -> dict[str, Term]:
        assert self.loss is not None
        L = batch.token_ids.shape[1]
        streams = two_stream(batch, noised, clean_stream=self.loss.clean_stream)
        seen = dense_mask(streams.ranges, 2 * L)[:, None]

        def attend(
            layer: int, q: Tensor, k: Tensor, v: Tensor, rows: Tensor | None = None
        ) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, enable_gqa=True)

        states = model.hidden(streams.ids, streams.positions, attend).flatten(0, 1)
        logits = model.logits(states).float()
        token, lengths = mask_reads(batch, noised, shift=True), length_reads(batch, noisy=L)
        targets = torch.full((len(logits),), -100)
        targets[token.readout] = token.target
        nats = F.cross_entropy(logits, targets, reduction="none")[token.readout]
        weight = torch.as_tensor(noised.weight[noised.masked], dtype=nats.dtype)
        said = model.length_logits(states[lengths.readout]).float()
        sums = {
            "nelbo": (weight * nats).sum(),
            "length": F.cross_entropy(said, lengths.target, reduction="sum"),
        }
        return {
            name: Term(sums[name], count) for name, count in count_terms(batch, self.loss).items()
        }
