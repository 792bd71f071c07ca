"""Forbidden tokens, kept words, and a budget of slots: asked for, obeyed, refused, logged."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abf.base import build
from abf.checked import validate
from abf.data.tokenizer import Encoded
from abf.decode.config import (
    AbfStrategy,
    DecoderConfig,
    FixedExtent,
    LengthHeadExtent,
    SamplerConfig,
    ThresholdStrategy,
)
from abf.decode.controls import Controls, controls
from abf.decode.replay import replay
from abf.decode.trace import read_trace
from abf.errors import ConfigError
from abf.model.transformer import Transformer
from tests.decode.tiny import tiny_decode, tiny_engine, tiny_prompts

BUSY = AbfStrategy(fill=0.4, substitute=0.1, delete=0.6, complete=0.2)
STRATEGIES = [ThresholdStrategy(threshold=0.4), BUSY]


class Letters:
    """A tokenizer of single letters."""

    vocab_size = 97

    def spans(self, texts: Sequence[str]) -> list[Encoded]:
        """Letter codes less 32."""
        ids = [np.array([ord(c) - 32 for c in text], dtype=np.uint32) for text in texts]
        return [Encoded(i, i, i, len(i)) for i in ids]


def config(**changes: Any) -> DecoderConfig:
    return DecoderConfig(strategy=BUSY, extent=FixedExtent(length=4), **changes)


def resolved(**changes: Any) -> Controls:
    return controls(config(**changes), Letters(), max_block=6, new_tokens=30)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.kind)
def test_forbidden_tokens_never_come(
    editor: Transformer, tmp_path: Path, strategy: Any, temperature: float
) -> None:
    def texts(forbidden: tuple[int, ...]) -> set[int]:
        engine = tiny_engine(
            editor,
            build(strategy, room="abf.decode.strategy"),
            controls=Controls(forbidden=forbidden),
            sampler=SamplerConfig(temperature=temperature),
        )
        samples = tiny_decode(tmp_path / "log", engine, tiny_prompts())
        _, events, _ = read_trace(tmp_path / "log")
        written = {
            e["new_id"] for e in events.to_pylist() if e["type"] in ("FILL", "SUBSTITUTE", "COMMIT")
        }
        assert {t for s in samples for t in s.token_ids.tolist()} <= written
        return written

    common = tuple(sorted(texts(()) - {0}))
    assert len(common) > 5
    assert not texts(common[::2]) & set(common[::2])


def test_the_log_shows_the_model_whatever_is_forbidden(editor: Transformer, tmp_path: Path) -> None:
    """So what a ban has changed can be counted: the likeliest token is another than the one."""
    strategy = build(ThresholdStrategy(threshold=0.4), room="abf.decode.strategy")
    tiny_decode(tmp_path / "free", tiny_engine(editor, strategy), tiny_prompts(1))
    first = next(e for e in read_trace(tmp_path / "free")[1].to_pylist() if e["type"] == "FILL")
    asked = Controls(forbidden=(first["new_id"],))
    tiny_decode(tmp_path / "ban", tiny_engine(editor, strategy, controls=asked), tiny_prompts(1))
    hits = [
        e for e in read_trace(tmp_path / "ban")[1].to_pylist()
        if e["type"] == "FILL" and e["uid"] == first["uid"]
    ]  # fmt: skip
    assert len(hits) == 1
    assert hits[0]["new_id"] != first["new_id"]
    if hits[0]["step"] == first["step"]:
        assert hits[0]["alt_ids"] == first["alt_ids"]


@pytest.mark.parametrize("strategy", STRATEGIES, ids=lambda s: s.kind)
def test_kept_words_stand_in_the_first_block(
    editor: Transformer, tmp_path: Path, strategy: Any
) -> None:
    asked = Controls(keep=((11, 12), (13,)))
    engine = tiny_engine(
        editor, build(strategy, room="abf.decode.strategy"), controls=asked,
        extent=build(LengthHeadExtent(), room="abf.decode.extent"), reopen=None,
    )  # fmt: skip
    samples = tiny_decode(tmp_path / "log", engine, tiny_prompts())
    assert replay(tmp_path / "log") == {s.request: s.token_ids.tolist() for s in samples}
    _, events, _ = read_trace(tmp_path / "log")
    log = events.to_pylist()
    for sample in samples:
        opening = [e for e in log if e["request"] == sample.request and e["block"] == 0]
        opening = [e for e in opening if e["step"] == -1]
        inserted = [e["uid"] for e in opening if e["type"] == "INSERT"]
        locked = [(e["uid"], e["new_id"]) for e in opening if e["type"] == "COMMIT"]
        assert [token for _, token in locked] == [11, 12, 13]
        assert locked[1][0] == locked[0][0] + 1, "a word stays together"
        assert len(inserted) >= 4
        first = sample.token_ids[: sample.block_length[0]].tolist()
        cut = first.index(0) if 0 in first else len(first)
        if cut == len(first):  # else the text may end before the words
            assert "11, 12" in str(first)
            assert 13 in first[first.index(12) :]


def test_words_lie_evenly_between_masks() -> None:
    slots, tokens = Controls(keep=((11, 12), (13,))).places(9)
    assert slots.tolist() == [2, 3, 6]
    assert tokens.tolist() == [11, 12, 13]
    assert Controls(keep=((11, 12), (13,))).places(4)[0].tolist() == [0, 1, 2]


def test_a_block_keeps_to_its_budget(editor: Transformer, tmp_path: Path) -> None:
    strategy = build(AbfStrategy(insert=0.3), room="abf.decode.strategy")
    engine = tiny_engine(editor, strategy, controls=Controls(max_slots=4))
    samples = tiny_decode(tmp_path / "log", engine, tiny_prompts())
    assert max(length for s in samples for length in s.block_length) <= 4
    slots: Counter[int] = Counter()
    for event in read_trace(tmp_path / "log")[1].to_pylist():
        request = event["request"]
        slots[request] += {"INSERT": 1, "DELETE": -1}.get(event["type"], 0)
        slots[request] *= not event["type"].endswith("COMPLETE")
        assert slots[request] <= 4


def test_texts_become_tokens() -> None:
    found = resolved(forbidden=(5, "a"), keep=("no",), max_slots=5)
    assert found == Controls((5, ord("a") - 32), ((ord("n") - 32, ord("o") - 32),), 5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forbidden": ("no",)}, r"'no' is 2 tokens \(\[78, 79\]\), not one"),
        ({"forbidden": (97,)}, "id 97 is outside the vocabulary of 97"),
        ({"forbidden": tuple(range(97))}, "every token of the vocabulary; leave one"),
        ({"forbidden": (79,), "keep": ("no",)}, "'no' holds token 79, which is forbidden"),
        ({"keep": ("abc", "def")}, "is 6 tokens, but a block holds at most 6"),
        ({"keep": ("ab",), "max_slots": 2}, "is 2 tokens, but a block holds at most 2"),
    ],
)
def test_what_cannot_be_done_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        resolved(**changes)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": {"kind": "ar"}, "keep": ["x"]}, "strategy `ar` opens no block"),
        ({"keep": [""]}, "an empty word"),
        (
            {"strategy": {"kind": "path"}, "sampler": {"temperature": 1.0}, "forbidden": [3]},
            r"forbidden=\(3,\) would be another law",
        ),
    ],
)
def test_controls_that_a_strategy_does_not_take(settings: dict[str, Any], message: str) -> None:
    whole = {"strategy": {"kind": "threshold"}, "extent": {"kind": "fixed", "length": 3}} | settings
    with pytest.raises(ConfigError, match=message):
        validate(DecoderConfig, whole, "here")


def test_what_was_asked_can_be_read_from_json() -> None:
    asked = config(forbidden=(3, "a"), keep=("b",))
    assert json.loads(asked.model_dump_json())["forbidden"] == [3, "a"]
