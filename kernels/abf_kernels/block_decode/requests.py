"""Who asks and who is seen in one forward pass of decoding: validated once, used by every layer.

Letters: B requests, N query rows and P new rows of all requests together, T pages a request may
have, C pages in all, S keys of a page.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

MOST_REQUESTS = (1 << 16) - 1
"""Of one forward pass: as many as the last axis of a GPU's grid has."""


@dataclass(frozen=True)
class Requests:
    """Made by `requests`, which refuses what is wrong."""

    table: Tensor
    """int32 [B,T] page of each S cached keys of a request, in order."""
    lengths: Tensor
    """int32 [B] cached keys."""
    queries: Tensor
    """int32 [B,2] its query rows, start..end-1 of N."""
    own: Tensor
    """int32 [B,2] its new rows, start..end-1 of P."""
    seen: Tensor
    """int32 [N] new rows that a query sees: the first so many of its request's."""
    page_size: int
    pages: int
    rows: int
    """N."""
    own_rows: int
    """P."""

    @cached_property
    def host(self) -> Host:
        """The small numbers, off the device."""
        return Host(
            lengths=self.lengths.tolist(),
            first_pages=self.table[:, 0].tolist(),
            queries=self.queries.tolist(),
            own=self.own.tolist(),
            seen=self.seen.tolist(),
        )


@dataclass(frozen=True)
class Host:
    """Python's copy of `Requests`."""

    lengths: list[int]
    first_pages: list[int]
    queries: list[list[int]]
    own: list[list[int]]
    seen: list[int]


def requests(
    table: Tensor,
    lengths: Tensor,
    queries: Tensor,
    own: Tensor,
    seen: Tensor,
    *,
    page_size: int,
    pages: int,
    rows: int,
    own_rows: int,
) -> Requests:
    """Check and keep what a forward pass is about. Letters as above.

    A cache of consecutive rows [C,G,S,D], one request a row, is that of pages as long as it: table
    = [[0], [1], ...].

    Args:
        table: int32 [B,T], B at most 65535; only entries of used pages are read. Requests may share
            a page.
        lengths: int32 [B], 0..T*S cached keys.
        queries: int32 [B,2], half open, at least one row, ascending, disjoint, within 0..N. Rows of
            no request are answered with 0.
        own: int32 [B,2], half open, ascending, disjoint, within 0..P; may be empty.
        seen: int32 [N], 0..(new rows of the query's request); of no meaning in other rows.
        page_size, pages, rows, own_rows: S, C, N and P.

    Raises:
        ValueError: on anything else, naming the argument.
    """
    for name, number in (
        ("page_size", page_size), ("pages", pages), ("rows", rows), ("own_rows", own_rows)
    ):  # fmt: skip
        least = 0 if name == "own_rows" else 1
        if not least <= number < 2**31:
            raise ValueError(f"{name} must lie within {least}..2^31-1; got {number}")
    given = {"table": table, "lengths": lengths, "queries": queries, "own": own, "seen": seen}
    for name, tensor in given.items():
        if tensor.dtype != torch.int32:
            raise ValueError(f"{name} must be int32; got {tensor.dtype}")
        if tensor.device != table.device:
            raise ValueError(f"{name} must have table's device {table.device}; got {tensor.device}")
    if table.ndim != 2 or 0 in table.shape:
        raise ValueError(
            f"table must have shape [requests >= 1, pages >= 1]; got {tuple(table.shape)}"
        )
    B = len(table)
    if B > MOST_REQUESTS:
        raise ValueError(f"table must have at most {MOST_REQUESTS} requests; got {B}")
    shapes = {"lengths": (B,), "queries": (B, 2), "own": (B, 2), "seen": (rows,)}
    for name, shape in shapes.items():
        if given[name].shape != shape:
            raise ValueError(f"{name} must have shape {shape}; got {tuple(given[name].shape)}")
    _check_pages(table, lengths, page_size, pages)
    _check_ranges("queries", queries, rows, least=1)
    _check_ranges("own", own, own_rows, least=0)
    _check_seen(seen, queries, own)
    table, lengths, queries, own, seen = (x.contiguous() for x in given.values())
    return Requests(table, lengths, queries, own, seen, page_size, pages, rows, own_rows)


def _check_pages(table: Tensor, lengths: Tensor, page_size: int, pages: int) -> None:
    T = table.shape[1]
    low, high = (int(bound) for bound in torch.aminmax(lengths))
    if low < 0 or high > T * page_size:
        raise ValueError(
            f"lengths must lie within 0..{T * page_size}, the keys of {T} pages; "
            f"got {low} to {high}"
        )
    if T > 1 or pages > 1 or high:
        column = torch.arange(T, device=table.device)
        used = column < (lengths[:, None] + page_size - 1) // page_size
        wrong = used & ((table < 0) | (table >= pages))
        if bool(wrong.any()):
            row, page = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"table must name pages 0..{pages - 1}; "
                f"got {int(table[row, page])} at request {row}, page {page}"
            )
        if T > 1:
            # Unused places get numbers of their own, below all pages.
            ordered = torch.where(used, table, -1 - column).sort(dim=1).values
            twice = (ordered[:, 1:] == ordered[:, :-1]).any(dim=1)
            if bool(twice.any()):
                row = int(twice.nonzero()[0])
                raise ValueError(f"table must not name a page twice in a request; request {row}")


def _check_ranges(name: str, ranges: Tensor, rows: int, *, least: int) -> None:
    found = ranges.tolist()
    before = 0
    for request, (start, end) in enumerate(found):
        if end - start < least:
            rule = "at least one row" if least else "start <= end"
            raise ValueError(f"{name} must have {rule}; got {(start, end)} at request {request}")
        if start < before:
            raise ValueError(
                f"{name} must ascend from 0 and not overlap; "
                f"got {(start, end)} behind {before} at request {request}"
            )
        before = end
    if before > rows:
        raise ValueError(f"{name} must lie within 0..{rows}; got {before}")


def _check_seen(seen: Tensor, queries: Tensor, own: Tensor) -> None:
    values, sizes = seen.tolist(), (own[:, 1] - own[:, 0]).tolist()
    for request, ((start, end), size) in enumerate(zip(queries.tolist(), sizes, strict=True)):
        for row in range(start, end):
            if not 0 <= values[row] <= size:
                raise ValueError(
                    f"seen must lie within 0..{size}, the new rows of request {request}; "
                    f"got {values[row]} at row {row}"
                )
