"""Operators called rightly, and the one thing that is changed to make each call wrong.

Letters: B batch or requests, H query heads, G kv heads, M queries, N keys or query rows, P new
rows, D head dim, S keys of a page, C pages, T pages a request may have, R rows, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from abf_kernels.block_attention.api import block_attention
from abf_kernels.block_decode.api import block_decode, decode_part, requests
from abf_kernels.masked_loss.api import masked_loss, predict
from torch import Tensor

Changes = dict[str, Any]
HUGE = 2**31


def attention(backend: Any, **changes: Any) -> Any:
    """B=2, H=4, G=2, M=5, N=6, D=8."""
    inputs = {
        "q": torch.zeros(2, 4, 5, 8),
        "k": torch.zeros(2, 2, 6, 8),
        "v": torch.zeros(2, 2, 6, 8),
        "ranges": torch.zeros(2, 5, 4, dtype=torch.int32),
    }
    return block_attention(**(inputs | changes), backend=backend)


def one_row(*values: int) -> Tensor:
    """Ranges of which one query's are these, the others' empty."""
    ranges = torch.zeros(2, 5, 4, dtype=torch.int32)
    ranges[1, 3] = torch.tensor(values)
    return ranges


def decode(backend: Any, **changes: Any) -> Any:
    """B=2, T=3, S=4, C=6, N=5, P=5, H=4, G=2, D=8; changes of requests and of tensors."""
    described: Changes = {
        "table": torch.tensor([[0, 1, -1], [2, 4, 5]], dtype=torch.int32),
        "lengths": torch.tensor([5, 12], dtype=torch.int32),
        "queries": torch.tensor([[0, 2], [2, 5]], dtype=torch.int32),
        "own": torch.tensor([[0, 2], [2, 5]], dtype=torch.int32),
        "seen": torch.tensor([1, 2, 3, 3, 3], dtype=torch.int32),
        "page_size": 4,
        "pages": 6,
        "rows": 5,
        "own_rows": 5,
    }
    tensors = {
        "q": torch.zeros(5, 4, 8),
        "k": torch.zeros(5, 2, 8),
        "v": torch.zeros(5, 2, 8),
        "keys": torch.zeros(6, 2, 4, 8),
        "values": torch.zeros(6, 2, 4, 8),
    }
    # An int64 of these tables stands for the numbers, not for a wrong dtype.
    numbers = {
        name: x.int() if isinstance(x, Tensor) and x.dtype == torch.int64 else x
        for name, x in changes.items()
        if name in described
    }
    others = {name: x for name, x in changes.items() if name not in described}
    return block_decode(
        **(tensors | others), asked=requests(**(described | numbers)), backend=backend
    )


def decode_history(backend: Any, **changes: Any) -> Any:
    """One request of a page of S=4, three of them cached; N=2, H=4, G=2, D=8."""
    inputs = {
        "q": torch.zeros(2, 4, 8),
        "keys": torch.zeros(1, 2, 4, 8),
        "values": torch.zeros(1, 2, 4, 8),
        "part": "history",
    }
    line = torch.tensor([[0, 2]], dtype=torch.int32)
    asked = requests(
        torch.zeros(1, 1, dtype=torch.int32), torch.tensor([3]).int(), line, line,
        torch.tensor([2, 2]).int(), page_size=4, pages=1, rows=2, own_rows=2,
    )  # fmt: skip
    return decode_part(**(inputs | changes), asked=asked, backend=backend)


def loss(backend: Any, **changes: Any) -> Any:
    """R=4, d=8, V=6."""
    inputs = {
        "hidden": torch.zeros(4, 8),
        "matrix": torch.zeros(6, 8),
        "target": torch.zeros(4, dtype=torch.int64),
        "weight": torch.zeros(4),
    }
    return masked_loss(**(inputs | changes), backend=backend)


def prediction(backend: Any, **changes: Any) -> Any:
    """R=4, d=8, V=6, k=2."""
    inputs = {
        "hidden": torch.zeros(4, 8),
        "matrix": torch.zeros(6, 8),
        "target": torch.zeros(4, dtype=torch.int64),
        "top": 2,
    }
    return predict(**(inputs | changes), backend=backend)


OPERATORS: dict[str, Callable[..., Any]] = {
    "block_attention": attention,
    "block_decode": decode,
    "decode_part": decode_history,
    "masked_loss": loss,
    "predict": prediction,
}

ATTENTION: dict[str, Changes] = {
    "q must have 4 axes": {"q": torch.zeros(4, 5, 8)},
    "k must have 4 axes": {"k": torch.zeros(2, 6, 8)},
    "q must be one of": {"q": torch.zeros(2, 4, 5, 8, dtype=torch.int64)},
    "k must have q's dtype": {"k": torch.zeros(2, 2, 6, 8, dtype=torch.float64)},
    "v must have q's device": {"v": torch.zeros(2, 2, 6, 8, device="meta")},
    r"q must have stride 1 in its last axis .*got 5": {"q": torch.zeros(2, 4, 8, 5).mT},
    "v must have stride 1 in its last axis": {"v": torch.zeros(2, 2, 6, 1).expand(2, 2, 6, 8)},
    "q must have a head dim": {"q": torch.zeros(2, 4, 5, 0)},
    "k must have q's batch": {"k": torch.zeros(1, 2, 6, 8)},
    "k must have q's head dim": {"k": torch.zeros(2, 2, 6, 4)},
    "v must have k's shape": {"v": torch.zeros(2, 2, 7, 8)},
    "k must have a head count that divides": {
        "k": torch.zeros(2, 3, 6, 8),
        "v": torch.zeros(2, 3, 6, 8),
    },
    "ranges must be int32 or int64": {"ranges": torch.zeros(2, 5, 4)},
    "ranges must have q's device": {"ranges": torch.zeros(2, 5, 4, dtype=torch.int32).to("meta")},
    "ranges must have shape": {"ranges": torch.zeros(2, 5, 2, dtype=torch.int32)},
    r"ranges must lie within \[0, 6\].*7": {"ranges": one_row(0, 7, 0, 0)},
    r"ranges must lie within \[0, 6\].*-1": {"ranges": one_row(0, 0, -1, 3)},
    r"ranges must have start <= end.*batch row 1, query 3": {"ranges": one_row(0, 0, 4, 3)},
    r"ranges must not overlap.*batch row 1, query 3": {"ranges": one_row(2, 5, 0, 3)},
    "q must have at most 1073741824 rows": {"q": torch.zeros(1, 1, 1, 8).expand(2, 4, HUGE, 8)},
    "k must have at most 1073741824 rows": {"k": torch.zeros(1, 1, 1, 8).expand(2, 2, HUGE, 8)},
    "q must be one of .*complex64": {"q": torch.zeros(2, 4, 5, 8, dtype=torch.complex64)},
    "scale must be finite": {"scale": math.nan},
}

REQUESTS: dict[str, Changes] = {
    "table must be int32": {"table": torch.zeros(2, 3)},
    "lengths must be int32": {"lengths": torch.zeros(2, dtype=torch.int16)},
    "seen must have table's device": {"seen": torch.zeros(5, dtype=torch.int32, device="meta")},
    r"table must have shape \[requests": {"table": torch.zeros(0, 3, dtype=torch.int32)},
    r"lengths must have shape \(2,\)": {"lengths": torch.tensor([5])},
    r"queries must have shape \(2, 2\)": {"queries": torch.tensor([0, 2, 5])},
    r"own must have shape \(2, 2\)": {"own": torch.tensor([[0, 2]])},
    r"seen must have shape \(5,\)": {"seen": torch.tensor([1, 2])},
    r"lengths must lie within 0\.\.12.*5 to 13": {"lengths": torch.tensor([5, 13])},
    r"lengths must lie within 0\.\.12.*-1 to 5": {"lengths": torch.tensor([-1, 5])},
    r"table must name pages 0\.\.5; got 6 at request 1, page 2": {
        "table": torch.tensor([[0, 1, -1], [2, 4, 6]])
    },
    r"table must name pages 0\.\.5; got -1 at request 0, page 1": {
        "table": torch.tensor([[0, -1, -1], [2, 4, 5]])
    },
    "table must not name a page twice in a request; request 1": {
        "table": torch.tensor([[0, 1, -1], [2, 4, 2]])
    },
    r"queries must have at least one row; got \(2, 2\) at request 1": {
        "queries": torch.tensor([[0, 2], [2, 2]])
    },
    r"queries must ascend from 0 and not overlap; got \(1, 5\) behind 2": {
        "queries": torch.tensor([[0, 2], [1, 5]])
    },
    r"queries must ascend from 0 and not overlap; got \(0, 2\) behind 5": {
        "queries": torch.tensor([[2, 5], [0, 2]])
    },
    r"queries must ascend from 0 and not overlap; got \(-1, 2\)": {
        "queries": torch.tensor([[-1, 2], [2, 5]])
    },
    r"queries must lie within 0\.\.5; got 6": {"queries": torch.tensor([[0, 2], [2, 6]])},
    r"own must have start <= end; got \(3, 2\)": {"own": torch.tensor([[0, 2], [3, 2]])},
    r"own must ascend from 0 and not overlap": {"own": torch.tensor([[0, 2], [1, 4]])},
    r"own must lie within 0\.\.5; got 6": {"own": torch.tensor([[0, 2], [3, 6]])},
    r"seen must lie within 0\.\.2, the new rows of request 0; got 3 at row 1": {
        "seen": torch.tensor([1, 3, 3, 3, 3])
    },
    r"seen must lie within 0\.\.3, the new rows of request 1; got -1 at row 4": {
        "seen": torch.tensor([1, 2, 3, 3, -1])
    },
    "page_size must lie within 1": {"page_size": 0},
    "pages must lie within 1": {"pages": 2**31},
    "rows must lie within 1": {"rows": 0},
    "own_rows must lie within 0": {"own_rows": -1},
    "rows must lie within 1.*got 2147483648": {"rows": HUGE},
    "page_size must lie within 1.*got 2147483648": {"page_size": HUGE},
    "own_rows must lie within 0.*got 2147483648": {"own_rows": HUGE},
    "table must have at most 65535 requests; got 65536": {
        "table": torch.zeros(65536, 1, dtype=torch.int32)
    },
}

DECODE: dict[str, Changes] = {
    r"q must have shape \[5 rows": {"q": torch.zeros(4, 4, 8)},
    r"q must have shape \[5 rows of asked, heads, head dim\]": {"q": torch.zeros(1, 5, 4, 8)},
    "q must have a head dim of 1..256; got 0": {"q": torch.zeros(5, 4, 0)},
    "q must have a head dim of 1..256; got 257": {"q": torch.zeros(5, 4, 257)},
    "q must have q's dtype, one of": {"q": torch.zeros(5, 4, 8, dtype=torch.int32)},
    "k must have q's dtype": {"k": torch.zeros(5, 2, 8).half()},
    "values must have q's dtype": {"values": torch.zeros(6, 2, 4, 8).double()},
    "keys must have the device of asked": {"keys": torch.zeros(6, 2, 4, 8, device="meta")},
    r"k must have shape \(5, 2, 8\)": {"k": torch.zeros(4, 2, 8)},
    r"v must have shape \(5, 2, 8\)": {"v": torch.zeros(5, 4, 8)},
    r"keys must have shape \(6, 2, 4, 8\)": {"keys": torch.zeros(6, 2, 5, 8)},
    r"values must have shape \(6, 2, 4, 8\)": {"values": torch.zeros(5, 2, 4, 8)},
    "k must have a head count that divides q's 4; got 3": {"k": torch.zeros(5, 3, 8)},
    "q must have contiguous heads": {"q": torch.zeros(5, 8, 4).transpose(1, 2)},
    "keys must have contiguous heads": {"keys": torch.zeros(6, 2, 8, 4).transpose(2, 3)},
    "v must not require a gradient": {"v": torch.zeros(5, 2, 8, requires_grad=True)},
    "scale must be finite": {"scale": math.inf},
    "q must have at most 65535 heads": {"q": torch.zeros(5, 65536, 8)},
}

PART: dict[str, Changes] = {
    "part must be one of history, own; got 'x'": {"part": "x"},
    r"q must have shape \[2 rows": {"q": torch.zeros(3, 4, 8)},
    "q must have a head dim of 1..256; got 257": {"q": torch.zeros(2, 4, 257)},
    "keys must have q's dtype": {"keys": torch.zeros(1, 2, 4, 8).half()},
    "values must have the device of asked": {"values": torch.zeros(1, 2, 4, 8, device="meta")},
    r"keys must have shape \(1, 2, 4, 8\)": {"keys": torch.zeros(2, 2, 4, 8)},
    r"values must have shape \(1, 2, 4, 8\)": {"values": torch.zeros(1, 2, 3, 8)},
    r"keys must have shape \(2, 2, 8\)": {"part": "own"},
    "keys must have contiguous heads": {"keys": torch.zeros(1, 2, 8, 4).mT},
    "keys must have a head count that divides q's 4; got 3": {"keys": torch.zeros(1, 3, 4, 8)},
    "scale must be finite": {"scale": -math.inf},
}

LOSS: dict[str, Changes] = {
    "hidden must have 2 axes": {"hidden": torch.zeros(4, 2, 4)},
    "matrix must have 2 axes": {"matrix": torch.zeros(6)},
    "hidden must be one of": {"hidden": torch.zeros(4, 8, dtype=torch.int32)},
    "matrix must be one of": {"matrix": torch.zeros(6, 8, dtype=torch.complex64)},
    "hidden must have contiguous rows": {"hidden": torch.zeros(8, 4).T},
    "matrix must have contiguous rows": {"matrix": torch.zeros(6, 16)[:, ::2]},
    "hidden must have a width of at least 1": {"hidden": torch.zeros(4, 0)},
    "matrix must have hidden's width 8; got 7": {"matrix": torch.zeros(6, 7)},
    "matrix must have at least 1 row": {"matrix": torch.zeros(0, 8)},
    "matrix must have hidden's device": {"matrix": torch.zeros(6, 8, device="meta")},
    "matrix must have at most 1073741824 rows": {"matrix": torch.zeros(1, 8).expand(2**31, 8)},
    r"target must have shape \(4,\)": {"target": torch.zeros(5, dtype=torch.int64)},
    "target must be int64 or int32": {"target": torch.zeros(4)},
    "target must have hidden's device": {
        "target": torch.zeros(4, dtype=torch.int64, device="meta")
    },
    r"target must lie within 0\.\.5.*got 0 to 6": {"target": torch.tensor([0, 6, 1, 2])},
    r"target must lie within 0\.\.5.*got -1 to 2": {"target": torch.tensor([0, -1, 1, 2])},
    r"weight must have shape \(4,\)": {"weight": torch.zeros(4, 1)},
    "weight must be one of": {"weight": torch.zeros(4, dtype=torch.int64)},
    "weight must have hidden's device": {"weight": torch.zeros(4, device="meta")},
    "weight must be constants": {"weight": torch.zeros(4, requires_grad=True)},
    "precision must be one of": {"precision": torch.int8},
    "hidden must have at most 1073741824 rows": {"hidden": torch.zeros(1, 8).expand(HUGE, 8)},
}

BAD: list[tuple[str, str, Changes]] = [
    (operator, message, changes)
    for operator, tables in {
        "block_attention": [ATTENTION],
        "block_decode": [REQUESTS, DECODE],
        "decode_part": [PART],
        "masked_loss": [LOSS],
        "predict": [
            {name: x for name, x in LOSS.items() if "weight" not in x},
            {rf"top must lie within 1\.\.6; got {top}": {"top": top} for top in (0, 7, 9)},
        ],
    }.items()
    for table in tables
    for message, changes in table.items()
]
