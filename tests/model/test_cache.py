"""Cached, batched decoding passes against each request alone without a cache."""

import pytest
import torch

from abf.model.attention import CacheAttend
from abf.model.cache import KVCache
from tests.diffusion.rows import V, tiny_model

torch.set_num_threads(1)
GENERATOR = torch.Generator().manual_seed(0)


def tokens(count: int) -> torch.Tensor:
    return torch.randint(V, (count,), generator=GENERATOR)


def alone(model, ids: torch.Tensor, block: int, own: str) -> torch.Tensor:
    """States of a text whose last `block` tokens are the newest: no cache, one request, [n, d]."""
    n = len(ids)
    row = torch.arange(n)
    seen = torch.where(row < n - block, row + 1, n if own == "block" else row + 1)
    ranges = torch.stack([torch.zeros_like(row), seen, seen, seen], dim=-1)[None]
    with torch.no_grad():
        return model.hidden(ids[None], row[None], model.attend(ranges, backend="reference"))[0]


def forward(model, cache, blocks: list[torch.Tensor], own, backend) -> torch.Tensor:
    """One pass over new rows of different number, padded; [B, M, d]."""
    lengths = torch.tensor([len(block) for block in blocks])
    ids = torch.nn.utils.rnn.pad_sequence(blocks, batch_first=True, padding_value=3)
    positions = cache.lengths[:, None] + torch.arange(ids.shape[1])
    attend = CacheAttend(cache, query_lengths=lengths, own=own, backend=backend)
    with torch.no_grad():
        return model.hidden(ids, positions, attend)


@pytest.mark.parametrize("backend", ["reference", "tiles"])
@pytest.mark.parametrize("own", ["block", "causal"])
def test_batched_passes_equal_each_request_alone(own, backend):
    """Different prompts and blocks, a pass that is not kept, one kept in part, one request gone."""
    model = tiny_model()
    cache = KVCache(model.config, 3, dtype=torch.float64, capacity=4)
    texts = [tokens(5), tokens(1), tokens(11)]
    forward(model, cache, texts, "causal", backend)
    cache.commit(torch.tensor([5, 1, 11]))
    for keep_only in (None, [2, 0]):
        if keep_only is not None:
            cache.select(torch.tensor(keep_only))
            texts = [texts[row] for row in keep_only]
        for kept in (False, True):
            blocks = [tokens(3 + 2 * row) for row in range(len(texts))]
            found = forward(model, cache, blocks, own, backend)
            for row, (text, block) in enumerate(zip(texts, blocks, strict=True)):
                wanted = alone(model, torch.cat((text, block)), len(block), own)[len(text) :]
                torch.testing.assert_close(found[row, : len(block)], wanted)
            if kept and own == "causal":
                # Causal rows of a prefix of the block stay what they were.
                part = torch.tensor([len(block) - 1 - row for row, block in enumerate(blocks)])
                cache.commit(part)
                texts = [
                    torch.cat((text, block[:n]))
                    for text, block, n in zip(texts, blocks, part, strict=True)
                ]
            else:
                cache.commit(torch.zeros(len(texts), dtype=torch.int64))
            assert cache.lengths.tolist() == [len(text) for text in texts]


def test_rows_past_a_requests_end_see_and_are_seen_by_nothing():
    model = tiny_model()
    cache = KVCache(model.config, 2, dtype=torch.float64)
    short, long = tokens(2), tokens(6)
    attend = CacheAttend(
        cache, query_lengths=torch.tensor([2, 6]), own="block", backend="reference"
    )
    assert attend.seen(6).tolist() == [[2, 2, 0, 0, 0, 0], [6] * 6]
    found = forward(model, cache, [short, long], "block", "reference")
    torch.testing.assert_close(found[0, :2], alone(model, short, 2, "block"))


def test_causal_rows_see_those_up_to_themselves():
    cache = KVCache(tiny_model().config, 2, dtype=torch.float64)
    attend = CacheAttend(
        cache, query_lengths=torch.tensor([1, 2]), own="causal", backend="reference"
    )
    assert attend.seen(2).tolist() == [[1, 0], [1, 2]]


def test_committing_more_than_was_computed_is_a_bug():
    cache = KVCache(tiny_model().config, 1, dtype=torch.float64)
    with pytest.raises(AssertionError, match="more rows committed"):
        cache.commit(torch.tensor([1]))


def test_a_cache_of_another_dtype_is_a_bug():
    model = tiny_model()
    cache = KVCache(model.config, 1, dtype=torch.float32)
    with pytest.raises(AssertionError, match="float32"):
        forward(model, cache, [tokens(2)], "block", "reference")
