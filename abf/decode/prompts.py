"""Prompts of a generative task: the first tokens or lines of held-out documents."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from abf.artifacts import PIECES, read_table
from abf.data.loader import PackedRows, spread
from abf.data.tokenizer import TextTokenizer
from abf.decode.request import Prompt
from abf.errors import ArtifactError, ConfigError
from abf.model.config import ModelConfig
from abf.model.transformer import Transformer

REST = 8
"""Slots a held-out document must have behind its prompt: there was something to continue."""


class PromptTask(Protocol):
    """What a generative task says of its prompts: each is so many tokens, or so many lines."""

    @property
    def prompts(self) -> int: ...

    @property
    def prompt_tokens(self) -> int | None: ...

    @property
    def prompt_lines(self) -> int | None: ...

    @property
    def new_tokens(self) -> int: ...


def held_out_prompts(
    task: PromptTask, packed: Path, model: Transformer, tokenizer: TextTokenizer
) -> list[Prompt]:
    """Held-out documents that are long enough, spread evenly, by their first tokens or lines."""
    folder = packed / "packed"
    rows = PackedRows(folder / "heldout.arrow")
    if rows.vocab_size != model.config.vocab_size:
        raise ArtifactError(
            f"{folder / 'heldout.arrow'} was packed with {rows.vocab_size} token ids, the model "
            f"has {model.config.vocab_size}; they do not belong together"
        )

    def whole(piece: dict[str, Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Tokens of a piece behind its document token, and the number of each one's block."""
        row, start = rows.rows([piece["row"]]), piece["start"]
        inside = slice(start + 1, start + piece["n_tokens"])
        return row.token_ids[0, inside], row.block_id[0, inside]

    def shorter(request: int, piece: dict[str, Any], count: int) -> Prompt:
        tokens, blocks = (values[:count] for values in whole(piece))
        lengths = np.unique(blocks, return_counts=True)[1]
        return Prompt(request, piece["doc_id"], tokens, tuple(lengths.tolist()))

    pieces = read_table(folder / "heldout.pieces.parquet", PIECES).to_pylist()
    pieces = [piece for piece in pieces if piece["part"] == 0]
    if task.prompt_tokens is not None:
        shown = [task.prompt_tokens] * len(pieces)
        wanted, rest = f"{task.prompt_tokens} prompt tokens and {REST} more", REST
    else:
        assert task.prompt_lines is not None, "a prompt is so many tokens, or so many lines"
        n_ends = line_ends(tokenizer)
        shown = [
            1 + int(np.searchsorted(n_ends[whole(piece)[0]].cumsum(), task.prompt_lines))
            for piece in pieces
        ]
        wanted, rest = f"{task.prompt_lines} lines and more behind them", 1
    found = [
        (piece, count)
        for piece, count in zip(pieces, shown, strict=True)
        if piece["n_tokens"] >= 1 + count + rest
    ]
    if len(found) < task.prompts:
        raise ConfigError(
            f"prompts={task.prompts}: only {len(found)} held-out documents have {wanted}; "
            "lower prompts, show less of a document, or hold out more text"
        )
    return [
        shorter(request, *found[index])
        for request, index in enumerate(spread(len(found), task.prompts))
    ]


def line_ends(tokenizer: TextTokenizer) -> NDArray[np.int64]:
    """How many newlines each token holds: [V]."""
    pieces = tokenizer.token_strings(range(tokenizer.vocab_size))
    return np.array([piece.count("\n") for piece in pieces])


def check_prompts(
    prompts: Sequence[Prompt], new_tokens: int, *, config: ModelConfig, back: int
) -> None:
    """Refuse prompts that cannot be continued.

    Raises:
        ConfigError: too few blocks to open with, or more tokens than the model has positions.
    """
    limit = config.max_positions
    for prompt in prompts:
        if len(prompt.block_length) < back:
            raise ConfigError(
                f"prompt {prompt.prompt_id!r}: it has {len(prompt.block_length)} blocks, but "
                f"extent `earlier` opens the next one with the block {back} before it: show "
                "more of the text, lower extent.back, or use another extent"
            )
        slots = 1 + len(prompt.token_ids) + new_tokens
        if slots > limit:
            raise ConfigError(
                f"prompt {prompt.prompt_id!r}: 1 + {len(prompt.token_ids)} prompt tokens + "
                f"{new_tokens} new tokens = {slots}, but the model has {limit} positions "
                f"({config.positions}): lower new_tokens, or show less of the text"
            )
