"""Which states tell the rates of a batch of path states, and what they say.

Letters: B batch rows, L clean and M noisy slots of a row, K blocks, n columns and m slots of the
longest block, R rows read, d width, V vocabulary.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from abf.diffusion.corrupt.path import PathBlocks
from abf.diffusion.head import head_reads
from abf.diffusion.layout import BlockReads
from abf.diffusion.path.align import Alignment, one_alignment, posterior
from abf.diffusion.path.bound import Rates, insert_rate, path_nats, substitute_rate
from abf.diffusion.path.law import PathLaw, Statuses
from abf.diffusion.policy.gates import INSERT, SUBSTITUTE, UNTIL


class Heads(Protocol):
    """What is read of the model."""

    @property
    def head_weight(self) -> Tensor: ...

    def edits(self, hidden: Tensor) -> Tensor: ...


def path_charges(
    heads: Heads,
    states: Tensor,
    reads: BlockReads,
    blocks: PathBlocks,
    *,
    law: PathLaw,
    longest: int,
    aligned: bool,
) -> Tensor:
    """Weighted integrand of each block, [K] nats; its mean over times is the bound's integral.

    Args:
        heads: of the model.
        states: [R + K*(m+1), d] states of `reads.rows`.
        reads: what they belong to.
        blocks: on their paths.
        law: of the paths.
        longest: slots of a block beyond which nothing is inserted.
        aligned: expected over alignments (to report) instead of the known one (to train on).
    """
    clean, text = torch.as_tensor(blocks.clean), torch.as_tensor(blocks.text)
    columns, slots = torch.as_tensor(blocks.columns), torch.as_tensor(blocks.slots)
    tau, mask_id = torch.as_tensor(blocks.tau), law.vocab
    (K, n), m = clean.shape, text.shape[1]
    statuses = law.statuses(tau)
    if aligned:
        alignment = posterior(clean, columns, text, slots, statuses, mask_id=mask_id)
    else:
        present, real = torch.as_tensor(blocks.present), torch.arange(n) < columns[:, None]
        alignment = one_alignment(present, real, slots=m)

    split = len(reads.token)
    token, own, floor = _tokens(
        heads, states[:split], reads, (clean, text), alignment, mix=law.wrong, aligned=aligned
    )
    edits = heads.edits(states[split:]).unflatten(0, (K, m + 1))
    each = Statuses(*(value[:, None] for value in vars(statuses).values()))
    room = (slots < longest)[:, None]
    rates = Rates(
        insert=insert_rate(edits[..., INSERT], edits[..., UNTIL], tau[:, None]) * room,
        substitute=substitute_rate(edits[:, :-1, SUBSTITUTE], law, each),
        token=token,
        own=own,
        floor=floor,
    )
    nats = path_nats(
        rates, alignment, clean=clean, columns=columns, text=text, slots=slots, law=law,
        mask_id=mask_id,
    )  # fmt: skip
    return nats * torch.as_tensor(blocks.weight)


def _tokens(
    heads: Heads,
    states: Tensor,
    reads: BlockReads,
    texts: tuple[Tensor, Tensor],
    alignment: Alignment,
    *,
    mix: float,
    aligned: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """`token` [K, m, n], `own` and `floor` [K, m] of the rates.

    With a known alignment a slot needs its own column's token alone, which then stands in the first
    column of that token; the others are left at zero, and nothing reads them.
    """
    block, slot = reads.block, reads.slot
    clean, text = texts
    (K, n), m = clean.shape, text.shape[1]
    held = text[block, slot].clamp(max=heads.head_weight.shape[0] - 1)
    if aligned:
        wanted = clean[block]
        into = torch.arange(n).expand(len(block), n)
    else:
        column = alignment.column[block, slot].argmax(dim=1)
        wanted = clean[block, column][:, None]
        into = (clean[block] == wanted).long().argmax(dim=1, keepdim=True)
    found, low = head_reads(
        states, heads.head_weight, torch.cat((wanted, held[:, None]), dim=1), mix=mix
    )
    at = (block[:, None].expand_as(into), slot[:, None].expand_as(into), into)
    token = found.new_zeros(K, m, n).index_put(at, found[:, :-1])
    own = found.new_zeros(K, m).index_put((block, slot), found[:, -1].exp())
    floor = found.new_zeros(K, m).index_put((block, slot), low)
    return token, own, floor
