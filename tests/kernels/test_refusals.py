"""Bad input is refused by the argument's name, by every back end of every operator alike."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch
from abf_kernels.block_attention import tiles
from abf_kernels.block_attention import triton as attention_kernels
from abf_kernels.block_attention.api import Backend
from abf_kernels.block_decode import triton as decode_kernels
from abf_kernels.masked_loss import triton as loss_kernels

from tests.kernels.bad_inputs import BAD, OPERATORS, one_row

BACKENDS = get_args(Backend)
FLOATS = {
    "block_attention": ("q", "k", "v"),
    "block_decode": ("q", "k", "v", "keys", "values"),
    "decode_part": ("q", "keys", "values"),
    "masked_loss": ("hidden", "matrix"),
    "predict": ("hidden", "matrix"),
}
SHAPES = {
    "block_attention": [(2, 4, 5, 8), (2, 2, 6, 8), (2, 2, 6, 8)],
    "block_decode": [(5, 4, 8), (5, 2, 8), (5, 2, 8), (6, 2, 4, 8), (6, 2, 4, 8)],
    "decode_part": [(2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8)],
    "masked_loss": [(4, 8), (6, 8)],
    "predict": [(4, 8), (6, 8)],
}


def typed(operator: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The right floats of an operator in another dtype."""
    return {
        name: torch.zeros(shape, dtype=dtype)
        for name, shape in zip(FLOATS[operator], SHAPES[operator], strict=True)
    }


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("operator", "message", "changes"), BAD, ids=[f"{one}-{other}" for one, other, _ in BAD]
)
def test_bad_input_is_refused_by_name(
    operator: str, message: str, changes: dict[str, Any], backend: str
) -> None:
    with pytest.raises(ValueError, match=message):
        OPERATORS[operator](backend, **changes)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_what_is_not_changed_is_right(operator: str, backend: str) -> None:
    OPERATORS[operator](backend)
    OPERATORS[operator](backend, **typed(operator, torch.float16))


@pytest.mark.parametrize("backend", BACKENDS)
def test_ranges_that_touch_or_are_empty_inside_another_are_valid(backend: str) -> None:
    for row in ((0, 3, 3, 6), (2, 2, 0, 6), (0, 6, 4, 4), (6, 6, 0, 0)):
        OPERATORS["block_attention"](backend, ranges=one_row(*row))


@pytest.mark.parametrize("operator", OPERATORS)
def test_unknown_back_ends_are_told_the_known(operator: str) -> None:
    with pytest.raises(
        ValueError, match="backend must be one of reference, tiles, triton; got 'flex'"
    ):
        OPERATORS[operator]("flex")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_refuses_what_it_cannot_compute(operator: str, dtype: torch.dtype) -> None:
    """float64 nowhere, and bfloat16 where it is interpreted: Triton does so wrongly."""
    first = FLOATS[operator][0]
    name = "precision" if FLOATS[operator][0] == "hidden" and dtype == torch.bfloat16 else first
    with pytest.raises(ValueError, match=f"^{name} must "):
        OPERATORS[operator]("triton", **typed(operator, dtype))


def test_float64_is_named_wherever_it_is() -> None:
    for name in ("hidden", "matrix"):
        wide = {name: typed("masked_loss", torch.float64)[name]}
        with pytest.raises(ValueError, match=f"{name} must not be float64 for the triton"):
            OPERATORS["masked_loss"]("triton", **wide)
    with pytest.raises(ValueError, match="precision must not be float64 for the triton"):
        OPERATORS["masked_loss"]("triton", precision=torch.float64)


@pytest.mark.parametrize("operator", OPERATORS)
def test_triton_refuses_a_cpu_unless_it_is_interpreted(
    operator: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_kernels, "_INTERPRETED", False)
    monkeypatch.setattr(decode_kernels, "INTERPRETED", False)
    monkeypatch.setattr(loss_kernels, "INTERPRETED", False)
    with pytest.raises(ValueError, match=r"(q|hidden) must be on a CUDA device.*TRITON_INTERPRET"):
        OPERATORS[operator]("triton")


def test_attention_on_triton_refuses_wide_heads() -> None:
    wide = {"q": torch.zeros(2, 4, 5, 129), "k": torch.zeros(2, 2, 6, 129)}
    with pytest.raises(ValueError, match=r"q must have a head dim of at most 128 .*; got 129"):
        OPERATORS["block_attention"]("triton", **wide, v=wide["k"])


@pytest.mark.parametrize(("name", "shape"), [("q", (2, 4, 5, 8)), ("k", (2, 2, 6, 8))])
def test_attention_on_triton_refuses_rows_too_far_apart(name: str, shape: tuple[int, ...]) -> None:
    """Offsets within a tile have 32 bits: the 128th row of a tile would be read elsewhere. None of
    the memory between rows is touched."""
    apart = (1 << 24) + 8
    memory = torch.empty(shape[2] * apart, dtype=torch.float16)
    inputs = typed("block_attention", torch.float16)
    far = inputs | {name: memory.as_strided(shape, (0, 0, apart, 1))}
    with pytest.raises(ValueError, match=f"{name} must have rows at most 16777216 elements apart"):
        OPERATORS["block_attention"]("triton", **far)


def test_attention_by_tiles_refuses_keys_that_float32_cannot_number() -> None:
    keys = torch.zeros(1, 1, 1, 8).expand(2, 2, tiles.MOST_KEYS + 1, 8)
    with pytest.raises(ValueError, match="k must have at most 8388608 keys for backend tiles"):
        OPERATORS["block_attention"]("tiles", k=keys, v=keys)
