"""What a teacher says of masked tokens: its likeliest tokens, for a student to agree with.

The teacher reads the same masks in blocks of its own (smaller ones: stage-wise distillation, BARD,
arXiv 2604.16514). Only its best few tokens are compared, forward KL on them, made to add up to one.

Letters: R masked slots, T tokens a slot, V vocabulary.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from abf_kernels.block_attention.api import Backend
from torch import Tensor

from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig
from abf.diffusion.corrupt.base import Noised
from abf.diffusion.device import on_its_device
from abf.diffusion.head import CHUNK, head_reads
from abf.diffusion.layout import mask_reads, run_starts, two_stream
from abf.diffusion.needed import read_states
from abf.diffusion.policy.own import Writer


@dataclass(frozen=True)
class Guide:
    """A teacher's likeliest tokens at every masked slot."""

    tokens: Tensor
    """[R, T] int64, in the order of `mask_reads`."""
    probs: Tensor
    """[R, T], of those tokens alone: rows sum to one."""


@torch.no_grad()
@on_its_device
def teach(
    teacher: Writer,
    batch: PackedBatch,
    noised: Noised,
    *,
    loss: LossConfig,
    backend: Backend,
    top: int,
) -> Guide:
    """The teacher's `top` likeliest tokens; `batch` has the blocks that it reads."""
    starts = run_starts(batch.block_id)
    own = dataclasses.replace(noised, block_start=(starts + 1) * (batch.document_id >= 0) - 1)
    streams = two_stream(batch, own, clean_stream=loss.clean_stream)
    reads = mask_reads(batch, own, shift=loss.shift)
    states = read_states(teacher, streams, reads.readout, backend=backend)
    tokens, probs = [], []
    for part in states.split(max(1, CHUNK // teacher.mask_id)):
        logits = teacher.logits(part)
        wide = torch.promote_types(logits.dtype, torch.float32)
        best = logits.softmax(dim=-1, dtype=wide).topk(min(top, teacher.mask_id))
        tokens.append(best.indices)
        probs.append(best.values / best.values.sum(dim=-1, keepdim=True))
    return Guide(torch.cat(tokens), torch.cat(probs))


def guide_nats(states: Tensor, matrix: Tensor, guide: Guide) -> Tensor:
    """KL from the teacher to the student on the teacher's tokens, [R] nats.

    Args:
        states: [R, d] of the student.
        matrix: [V, d] its output matrix.
        guide: of the teacher.
    """
    found, _ = head_reads(states, matrix, guide.tokens)
    said = found - found.logsumexp(dim=-1, keepdim=True)
    return (torch.xlogy(guide.probs, guide.probs) - guide.probs * said).sum(dim=-1)
