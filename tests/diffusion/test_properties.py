"""What two-stream training must be equal to, checked through the real model in float64.

The numbers are those of notes/training.md §4; 6 is in test_estimators.py, 7 and 8 in test_loss.py.
Letters: B batch rows, L row length, d width.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
import pytest
import torch
from torch import Tensor

from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig
from abf.diffusion.corrupt.base import Noised
from abf.diffusion.layout import mask_reads, predicted, two_stream
from abf.diffusion.loss import ar_charges, block_charges, loss_terms, scatter
from abf.model.attention import Attend, CacheAttend
from abf.model.cache import KVCache
from abf.model.transformer import Transformer
from tests.diffusion.rows import make_batch, noise, tiny_model

CleanStream = Literal["context_causal", "block_causal"]
Own = Literal["block", "causal"]
CLEAN_STREAMS: list[CleanStream] = ["context_causal", "block_causal"]
L = 26
BATCH = make_batch([[[1, 3, 2, 4], [2, 5]], [[5, 1, 1], [3, 6, 2]]], L)
TERMS = ("nelbo", "ar", "length")


def states(model: Transformer, batch: PackedBatch, noised: Noised, clean_stream: CleanStream):
    """States of all rows of both streams, [B, 2L, d]."""
    streams = two_stream(batch, noised, clean_stream=clean_stream)
    attend = model.attend(streams.ranges, backend="reference")
    return model.hidden(streams.ids, streams.positions, attend)


def id_predicate(batch: PackedBatch, clean_stream: CleanStream) -> Tensor:
    """Who sees whom, [B, 2L, 2L] bool, from ids one pair at a time (BD3-LM; NBDiff if causal)."""
    B, L = batch.token_ids.shape
    seen = np.zeros((B, 2 * L, 2 * L), dtype=bool)
    for b, q, k in np.ndindex(B, 2 * L, 2 * L):
        (q_clean, i), (k_clean, j) = divmod(q, L), divmod(k, L)
        document, block = batch.document_id[b], batch.block_id[b]
        if document[i] != document[j] or document[i] < 0:
            continue
        if not q_clean and not k_clean:
            seen[b, q, k] = block[i] == block[j]
        elif not q_clean:
            seen[b, q, k] = block[j] < block[i]
        elif k_clean:
            causal = clean_stream == "context_causal"
            seen[b, q, k] = j <= i if causal else block[j] <= block[i]
    return torch.from_numpy(seen)


def dense_attend(seen: Tensor) -> Attend:
    """Attention with a dense mask, by torch's own kernel; rows that see nothing give 0."""

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        found = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=seen[:, None], enable_gqa=True
        )
        return found.masked_fill(~seen.any(-1)[:, None, :, None], 0.0)

    return attend


# 1 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean_stream", CLEAN_STREAMS)
@pytest.mark.parametrize("backend", ["reference", "tiles"])
def test_range_attention_equals_the_id_predicate_through_the_model(clean_stream, backend):
    model, noised = tiny_model(), noise(BATCH)
    streams = two_stream(BATCH, noised, clean_stream=clean_stream)
    wanted = model.hidden(
        streams.ids, streams.positions, dense_attend(id_predicate(BATCH, clean_stream))
    )
    found = model.hidden(
        streams.ids, streams.positions, model.attend(streams.ranges, backend=backend)
    )
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10)


# 2 -------------------------------------------------------------------------------------------


def block_by_block(
    model: Transformer, tokens: Tensor, noisy: Tensor, lengths: list[int], clean_stream: CleanStream
) -> tuple[Tensor, Tensor]:
    """States of a piece's noisy and clean tokens, one block at a time with a KV cache, [n, d]."""
    cache = KVCache(model.config, 1, dtype=next(model.parameters()).dtype, capacity=2)
    found: tuple[list[Tensor], list[Tensor]] = ([], [])
    start = 0
    after: Own = "causal" if clean_stream == "context_causal" else "block"

    def states_of(ids: Tensor, start: int, size: int, own: Own) -> Tensor:
        attend = CacheAttend(
            cache, query_lengths=torch.tensor([size]), own=own, backend="reference"
        )
        place = torch.arange(start, start + size)
        return model.hidden(ids[None, place], place[None], attend)[0]

    for size in lengths:
        found[0].append(states_of(noisy, start, size, "block"))
        found[1].append(states_of(tokens, start, size, after))
        cache.commit(torch.tensor([size]))
        start += size
    return torch.cat(found[0]), torch.cat(found[1])


@pytest.mark.parametrize("clean_stream", CLEAN_STREAMS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_one_pass_over_both_streams_equals_block_by_block(clean_stream, dtype, tolerance):
    model, noised = tiny_model(dtype=dtype), noise(BATCH)
    with torch.no_grad():
        whole = states(model, BATCH, noised, clean_stream)
        for row, document in enumerate(BATCH.document_id):
            for number in np.unique(document[document >= 0]):
                slots = np.nonzero(document == number)[0]
                _, lengths = np.unique(BATCH.block_id[row, slots], return_counts=True)
                noisy, clean = block_by_block(
                    model,
                    torch.from_numpy(BATCH.token_ids[row, slots]),
                    torch.from_numpy(noised.noisy_ids[row, slots]),
                    lengths.tolist(),
                    clean_stream,
                )
                for found, wanted in ((noisy, whole[row, slots]), (clean, whole[row, slots + L])):
                    torch.testing.assert_close(found, wanted, rtol=0, atol=tolerance)


# 3 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_clean_stream_is_the_ar_model_whatever_blocks_and_noise(seed):
    model = tiny_model()
    other = make_batch([[[8, 2], [1] * 7], [[2] * 3 + [1], [4, 4, 3]]], L)
    wanted = scatter(ar_charges(model, BATCH, backend="reference"), BATCH)
    for batch in (BATCH, other):
        assert (batch.token_ids == BATCH.token_ids).all()
        charges = block_charges(
            model,
            batch,
            noise(batch, seed=seed),
            loss=LossConfig(),
            backend="reference",
            terms=TERMS,
        )
        np.testing.assert_allclose(scatter(charges["ar"], batch), wanted, rtol=0, atol=1e-10)


# 4 -------------------------------------------------------------------------------------------


def gradients(model: Transformer, total: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    total.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_blocks_of_one_token_with_shift_are_the_ar_model_loss_and_gradients():
    model = tiny_model()
    batch = make_batch([[[1] * 9, [1] * 7], [[1] * 20]], L)
    loss = LossConfig(ar_weight=0, length_weight=0)
    terms = loss_terms(model, batch, noised=noise(batch), loss=loss, backend="reference")
    ar = loss_terms(model, batch, noised=None, loss=None, backend="reference")
    assert terms["nelbo"].count == ar["ar"].count
    torch.testing.assert_close(terms["nelbo"].sum, ar["ar"].sum, rtol=0, atol=1e-10)
    found, wanted = gradients(model, terms["nelbo"].sum), gradients(model, ar["ar"].sum)
    # MASK is an input of the noisy stream, which no read-out sees here: its gradient is zero.
    for name in found.keys() | wanted.keys():
        a, b = found.get(name), wanted.get(name)
        if a is None or b is None:
            rest = a if b is None else b
            assert rest is not None
            assert not rest.any(), name
        else:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-10, msg=name)


def test_blocks_of_one_token_without_shift_are_ar_in_form_only():
    """Each token is predicted from everything before it and a MASK in its own place, weight 1."""
    model = tiny_model()
    batch = make_batch([[[1] * 9]], 12)
    charges = block_charges(
        model,
        batch,
        noise(batch),
        loss=LossConfig(shift=False),
        backend="reference",
        terms=("nelbo",),
    )
    assert (scatter(charges["nelbo"], batch)[predicted(batch)] > 0).all()
    ids, place = torch.from_numpy(batch.token_ids), torch.arange(12)[None]
    for slot in range(1, 10):
        masked_ids = ids[:, : slot + 1].clone()
        masked_ids[0, slot] = model.mask_id
        causal = torch.ones(slot + 1, slot + 1, dtype=torch.bool).tril()[None]
        state = model.hidden(masked_ids, place[:, : slot + 1], dense_attend(causal))[0, slot]
        nll = -model.logits(state).log_softmax(-1)[ids[0, slot]]
        torch.testing.assert_close(charges["nelbo"].nll[slot - 1], nll.detach())


# 5 -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clean_stream", CLEAN_STREAMS)
@pytest.mark.parametrize("shift", [True, False])
def test_a_block_learns_nothing_from_its_own_clean_tokens_or_from_elsewhere(clean_stream, shift):
    """Zero gradient of a block's predictions to clean tokens of its own and later blocks, to other
    noisy blocks, and to other documents; and a gradient where there should be one."""
    model = tiny_model()
    noised = noise(BATCH)
    streams = two_stream(BATCH, noised, clean_stream=clean_stream)
    reads = mask_reads(BATCH, noised, shift=shift)
    embedded = model.embed(streams.ids).detach().requires_grad_()
    model.embed = lambda ids: embedded
    hidden = model.hidden(
        streams.ids,
        streams.positions,
        model.attend(streams.ranges, backend="reference"),
        rows=reads.readout,
    )
    row, slot = np.divmod(reads.slot.numpy(), L)
    for b in range(len(BATCH.token_ids)):
        document, block = BATCH.document_id[b], BATCH.block_id[b]
        for number in np.unique(block[block >= 0]):
            of_block = np.nonzero((row == b) & (block[slot] == number))[0]
            if not len(of_block):
                continue
            owner = document[block == number][0]
            (grad,) = torch.autograd.grad(hidden[of_block].sum(), embedded, retain_graph=True)
            touched = grad.abs().sum(-1).numpy() > 0
            noisy, clean = touched[b, :L], touched[b, L:]
            assert not touched[np.arange(len(touched)) != b].any()
            assert not (noisy & (block != number)).any()
            assert not (clean & ((block >= number) | (document != owner))).any()
            assert clean[(block < number) & (document == owner)].any()


def test_the_ar_term_sees_no_token_it_predicts():
    model = tiny_model()
    streams = two_stream(BATCH, noise(BATCH), clean_stream="context_causal")
    embedded = model.embed(streams.ids).detach().requires_grad_()
    model.embed = lambda ids: embedded
    attend = model.attend(streams.ranges, backend="reference")
    clean = model.hidden(streams.ids, streams.positions, attend)[0, L:]
    for slot in np.nonzero(predicted(BATCH)[0])[0]:
        (grad,) = torch.autograd.grad(clean[slot - 1].sum(), embedded, retain_graph=True)
        touched = grad.abs().sum(-1)[0] > 0
        assert not touched[:L].any()
        assert not touched[L + slot :].any()
        assert touched[L + slot - 1]
