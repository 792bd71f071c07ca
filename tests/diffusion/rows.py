"""Packed rows from block lengths written by hand, filled with bytes of real prose, and tiny models.

Letters: B batch rows, L row length, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch

from abf.data.loader import PackedBatch
from abf.diffusion.config import MaskedCorruption
from abf.diffusion.corrupt.base import Corrupter, Noised, build_corruption
from abf.model.config import ModelConfig
from abf.model.transformer import Transformer

torch.set_num_threads(1)  # the matrices are tiny, and other work shares the machine

PROSE = b"""\
A river that runs to the sea carries the hills with it, a little at a time. In spring the water is
brown and loud; in August you can walk across on the stones and keep your shoes dry. The miller knew
both rivers, and charged the same for flour in either. "Grain does not ask," he said.
"""
DOCUMENT = 0
V = 257  # bytes, and the document token
S = 8

Piece = list[int]
"""Block lengths of a piece, its document token not counted."""


def make_batch(rows: list[list[Piece]], L: int, *, first_piece: int = 0) -> PackedBatch:
    """Rows of pieces of blocks, padded to L; pieces are numbered along the rows."""
    shape = (len(rows), L)
    token_ids = np.full(shape, DOCUMENT, dtype=np.int64)
    block_id, document_id = np.full(shape, -1, np.int64), np.full(shape, -1, np.int64)
    number = first_piece
    for row, pieces in enumerate(rows):
        slot = block = 0
        for lengths in pieces:
            size = 1 + sum(lengths)
            assert slot + size <= L
            text = np.frombuffer((PROSE * 3)[17 * number : 17 * number + size - 1], np.uint8)
            token_ids[row, slot + 1 : slot + size] = text.astype(np.int64) + 1
            blocks = np.repeat(np.arange(len(lengths) + 1), [1, *lengths])
            block_id[row, slot : slot + size] = block + blocks
            document_id[row, slot : slot + size] = number
            slot, block, number = slot + size, block + len(lengths) + 1, number + 1
    return PackedBatch(token_ids, block_id, document_id, np.arange(len(rows)))


def take(batch: PackedBatch, index: list[int]) -> PackedBatch:
    """Some rows of a batch."""
    return batch.take(index)


def tiny_model(
    *, dtype: torch.dtype = torch.float64, seed: int = 0, **changes: object
) -> Transformer:
    """Two layers of random weights, large enough that attention matters; length head not zero."""
    settings = {
        "vocab_size": V,
        "d_model": 24,
        "layers": 2,
        "heads": 4,
        "kv_heads": 2,
        "head_dim": 6,
        "d_ff": 40,
        "max_block": S,
        "document_id": DOCUMENT,
    }
    model = Transformer(ModelConfig.model_validate(settings | changes))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(0.0, 0.3, generator=generator)
        model.mask_embedding.normal_(0.0, 0.3, generator=generator)
    return model.to(dtype)


def masked(*, stratify: bool = True, mask_id: int = V) -> Corrupter:
    """The masked corruption."""
    return build_corruption(MaskedCorruption(stratify=stratify), mask_id=mask_id)


def noise(batch: PackedBatch, *, seed: int = 0, draw: int = 0) -> Noised:
    """One masked draw, epoch 0."""
    epochs = np.zeros(len(batch.token_ids), dtype=np.int64)
    return masked().apply(batch, seed=seed, epochs=epochs, draw=draw)
