"""What a person asks of a text beside the prompt: tokens it may not hold, words it must, lengths.

Letters: n slots of a block, k tokens to keep.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from abf.data.tokenizer import Encoded
from abf.decode.config import DecoderConfig
from abf.errors import ConfigError


class Encoder(Protocol):
    """What is needed of a tokenizer."""

    @property
    def vocab_size(self) -> int: ...

    def spans(self, texts: Sequence[str]) -> Sequence[Encoded]: ...


@dataclass(frozen=True)
class Controls:
    """Controls in token ids."""

    forbidden: tuple[int, ...] = ()
    """Never chosen."""
    keep: tuple[tuple[int, ...], ...] = ()
    """Words that the first block opens with, locked."""
    max_slots: int | None = None
    """Most slots of a block."""

    def length(self, length: int, *, first: bool) -> int:
        """Slots to open instead of so many: room for what is kept and a mask beside it."""
        if first and self.keep:
            length = max(length, sum(map(len, self.keep)) + 1)
        return length if self.max_slots is None else min(length, self.max_slots)

    def places(self, length: int) -> tuple[NDArray[np.intp], NDArray[np.int32]]:
        """Slots [k] and tokens [k] of the words, masks spread evenly before, between and behind."""
        free = length - sum(map(len, self.keep))
        before = free * np.arange(1, len(self.keep) + 1) // (len(self.keep) + 1)
        words = np.repeat(before, [len(word) for word in self.keep])
        tokens = np.array([token for word in self.keep for token in word], dtype=np.int32)
        return words + np.arange(len(tokens)), tokens


NO_CONTROLS = Controls()


def controls(
    cfg: DecoderConfig, tokenizer: Encoder, *, max_block: int, new_tokens: int
) -> Controls:
    """Controls of a decoder.

    Raises:
        ConfigError: a forbidden text is not one token, an id is outside the vocabulary, nothing is
            left to write, a kept word holds a forbidden token, or the kept words do not fit in a
            block.
    """
    forbidden = tuple(_token(entry, tokenizer) for entry in cfg.forbidden)
    if len(set(forbidden)) == tokenizer.vocab_size:
        raise ConfigError("forbidden: every token of the vocabulary; leave one to write")
    keep = tuple(tuple(each.ids.tolist()) for each in tokenizer.spans(cfg.keep))
    for word, ids in zip(cfg.keep, keep, strict=True):
        if banned := set(ids) & set(forbidden):
            raise ConfigError(f"keep: {word!r} holds token {min(banned)}, which is forbidden")
    room = min(max_block, new_tokens, cfg.max_slots or max_block)
    if keep and (count := sum(map(len, keep))) >= room:
        raise ConfigError(
            f"keep={list(cfg.keep)} is {count} tokens, but a block holds at most {room} slots (of "
            f"the model {max_block}, new_tokens {new_tokens}, max_slots {cfg.max_slots}), and one "
            "must be left to fill: keep less"
        )
    return Controls(forbidden, keep, cfg.max_slots)


def _token(entry: int | str, tokenizer: Encoder) -> int:
    if isinstance(entry, str):
        ids = tokenizer.spans([entry])[0].ids.tolist()
        if len(ids) != 1:
            raise ConfigError(f"forbidden: {entry!r} is {len(ids)} tokens ({ids}), not one")
        return int(ids[0])
    if not 0 <= entry < tokenizer.vocab_size:
        raise ConfigError(
            f"forbidden: id {entry} is outside the vocabulary of {tokenizer.vocab_size} tokens"
        )
    return entry
