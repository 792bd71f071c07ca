"""Islands: tiles that share keys, however indirectly, are summed together; others need not be."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from abf_kernels.block_attention import plan, tiles
from abf_kernels.block_attention.metadata import causal_ranges, two_stream_ranges
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components
from torch import Tensor

from tests.kernels.dense import any_ranges, check, visible

DOCUMENTS = [40, 7, 130, 3, 3, 64, 65, 20]


def keys_of(spans: list[tuple[int, int]]) -> set[int]:
    return {key for start, end in spans for key in range(start, end)}


def seen_keys(tile: plan.Tile) -> set[int]:
    return keys_of([(start, end) for start, end, _ in tile.seen])


def parts(planned: list[plan.Tile], n_keys: int) -> set[frozenset[tuple[int, int]]]:
    """Tiles that keys join, by SciPy's connected components of the graph between both."""
    size = len(planned) + n_keys
    edges = [(at, len(planned) + key) for at, tile in enumerate(planned) for key in seen_keys(tile)]
    ends = np.array(edges, dtype=int).reshape(-1, 2).T
    _, label = connected_components(coo_matrix((np.ones(len(edges)), ends), (size, size)))
    members: dict[int, set[tuple[int, int]]] = {}
    for tile, of in zip(planned, label[: len(planned)], strict=True):
        if tile.seen:
            members.setdefault(of, set()).add((tile.start, tile.end))
    return set(map(frozenset, members.values()))


@settings(max_examples=150, deadline=None)
@given(drawn=any_ranges(), rows=st.integers(1, 9), most=st.sampled_from([0, 5, 20, 1000]))
def test_islands_are_the_connected_parts_of_any_plan(drawn, rows: int, most: int) -> None:
    ranges, n_keys = drawn
    mask = visible(ranges, n_keys)[0]
    planned = plan.plan_tiles(ranges, n_keys, rows)[0]
    for tile in planned:
        inside = [key for start, end in tile.spans for key in range(start, end)]
        columns = [c + i for start, end, c in tile.seen for i in range(end - start)]
        keys = [key for start, end, _ in tile.seen for key in range(start, end)]
        assert [inside[column] for column in columns] == keys
        rest = [key for key in range(n_keys) if key not in set(keys)]
        assert not mask[tile.start : tile.end][:, rest].any()

    found = plan.islands(planned, most)
    for island in found:
        assert keys_of(island.keys) == set().union(*(seen_keys(tile) for tile in island.tiles))
        assert island.size == len(keys_of(island.keys))
        assert all(a[1] < b[0] for a, b in zip(island.keys, island.keys[1:], strict=False))
    assert sum(island.size for island in found) == len(set().union(set(), *map(seen_keys, planned)))

    wanted = parts(planned, n_keys)
    got = [{(tile.start, tile.end) for tile in island.tiles} for island in found]
    together = [[part for part in wanted if part <= island] for island in got]
    assert sorted(map(sorted, got)) == sorted(
        sorted(set().union(*island_parts)) for island_parts in together
    )
    assert sum(map(len, together)) == len(wanted)
    for island, its_parts in zip(found, together, strict=True):
        assert len(its_parts) == 1 or island.size <= most


def ids(sizes: list[int]) -> tuple[Tensor, Tensor]:
    """Documents of these lengths, blocks of 11, of one row."""
    lengths = torch.tensor(sizes)
    document = torch.arange(len(sizes)).repeat_interleave(lengths)[None]
    block = torch.cat([torch.arange(size) // 11 for size in sizes])[None]
    return document, block + 100 * document


def test_documents_are_islands_and_short_ones_share_one() -> None:
    """Tiles of at most 64 queries; documents below 48 tokens go with what follows them."""
    document, block = ids([64, 100, 50, 200])
    one = plan.plan_tiles(causal_ranges(document), 414, 64)[0]
    assert [island.keys for island in plan.islands(one, 0)] == [
        [(0, 64)],
        [(64, 164)],
        [(164, 214)],
        [(214, 414)],
    ]
    assert [island.keys for island in plan.islands(one, 170)] == [
        [(0, 164)],
        [(164, 214)],
        [(214, 414)],
    ]
    ranges = two_stream_ranges(document, block, clean_stream="context_causal")
    two = plan.plan_tiles(ranges, 828, 64)[0]
    clean_and_noisy = [sorted(island.keys) for island in plan.islands(two, 0)]
    assert len(clean_and_noisy) == 4
    assert clean_and_noisy[1][0][0] == 64
    assert clean_and_noisy[1][-1][1] == 414 + 164


@pytest.mark.parametrize("scratch", [1, 1 << 9, 1 << 12, 1 << 19])
@pytest.mark.parametrize("rows", [16, 128])
@pytest.mark.parametrize("heads", [(5, 5), (4, 2)])
def test_gradients_of_many_documents_whatever_is_summed_at_once(
    monkeypatch: pytest.MonkeyPatch, scratch: int, rows: int, heads: tuple[int, int]
) -> None:
    """Against float64: one island or many, of one head, some heads or all."""
    monkeypatch.setattr(tiles, "SCRATCH", scratch)
    monkeypatch.setattr(tiles, "ROWS", rows)
    document, block = ids(DOCUMENTS)
    ranges = two_stream_ranges(document, block, clean_stream="context_causal")
    check(ranges, 2 * sum(DOCUMENTS), backend="tiles", dtype=torch.float64, heads=heads)
