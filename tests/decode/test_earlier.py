"""Blocks that open with the text of an earlier one: decoded, logged, audited, shown, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abf.base import build
from abf.checked import validate
from abf.decode.audit import audit
from abf.decode.config import AbfStrategy, DecoderConfig, EarlierExtent
from abf.decode.page import page
from abf.decode.replay import replay
from abf.decode.request import Prompt, Sample
from abf.decode.trace import TraceWriter, read_trace
from abf.errors import ArtifactError, ConfigError
from abf.files import sha256
from abf.model.store import WEIGHTS, save_model
from abf.model.transformer import Transformer
from tests.decode.tiny import V, header, tiny_engine

BUSY = AbfStrategy(fill=0.4, substitute=0.1, delete=0.6, complete=0.2)
LENGTHS = [(4, 2, 5), (3, 6), (2, 2, 2, 9)]


def prompts() -> list[Prompt]:
    rng = np.random.default_rng(0)
    return [
        Prompt(i, f"text-{i}", rng.integers(1, V, size=sum(lengths)), lengths)
        for i, lengths in enumerate(LENGTHS)
    ]


def decoded(
    folder: Path, model: Transformer, *, back: int = 2, said: int | None = None, **changes: Any
) -> list[Sample]:
    """Samples, and a log whose header says `said`; the model is in `folder`/model."""
    save_model(model, folder / "model")
    more = {
        "shift": "true",
        "clean_stream": "context_causal",
        "dtype": "fp32",
        "decoder": json.dumps({"extent": {"kind": "earlier", "back": said or back}}),
        "model_sha256": sha256(folder / "model" / WEIGHTS),
    }
    extent = build(EarlierExtent(back=back), room="abf.decode.extent")
    engine = tiny_engine(model, build(BUSY, room="abf.decode.strategy"), extent=extent, **changes)
    with TraceWriter(folder / "log", header(len(LENGTHS), **more)) as trace:
        return engine.run(prompts(), new_tokens=20, trace=trace)


def openings(folder: Path, request: int) -> list[list[int]]:
    """What each block of a request held after its opening, from the log's events."""
    events = [e for e in read_trace(folder / "log")[1].to_pylist() if e["request"] == request]
    blocks: list[list[int]] = []
    for event in events:
        if event["type"] == "OPEN":
            blocks.append([])
        elif event["type"] == "FILL" and event["step"] == -1:
            blocks[-1].append(event["new_id"])
    return blocks


@pytest.mark.parametrize("reopen", [None, -2.0])
@pytest.mark.parametrize("back", [1, 2])
def test_a_block_opens_with_the_one_so_many_before(
    editor: Transformer, tmp_path: Path, back: int, reopen: float | None
) -> None:
    samples = decoded(tmp_path, editor, back=back, reopen=reopen)
    assert replay(tmp_path / "log") == {s.request: s.token_ids.tolist() for s in samples}
    for sample, lengths in zip(samples, LENGTHS, strict=True):
        text = [*sample.prompt_ids.tolist(), *sample.token_ids.tolist()]
        sizes = [*lengths, *sample.block_length]
        ends = np.cumsum(sizes).tolist()
        blocks = [text[end - size : end] for size, end in zip(sizes, ends, strict=True)]
        left = 20 - np.cumsum([0, *sample.block_length])
        found = openings(tmp_path, sample.request)
        assert len(found) == len(sample.block_length)
        for number, held in enumerate(found):
            assert held == blocks[len(lengths) + number - back][: left[number]]
    assert max(len(s.block_length) for s in samples) > 2
    events = read_trace(tmp_path / "log")[1].to_pylist()
    counted = sum(s.edits["FILL"] for s in samples)
    assert counted == sum(e["type"] == "FILL" and e["step"] >= 0 for e in events)
    assert any(e["type"] in ("SUBSTITUTE", "DELETE") and e["step"] == 0 for e in events)


def test_the_audit_knows_what_a_block_must_open_with(editor: Transformer, tmp_path: Path) -> None:
    decoded(tmp_path, editor)
    found = audit(tmp_path / "log", model_dir=tmp_path / "model", steps=40)
    assert found.complete
    assert found.largest < 1e-4
    told = tmp_path / "other"
    told.mkdir()
    decoded(told, editor, back=1, said=2)
    message = (
        r"first bad event is request 0, seq 12 \(OPEN, block 0\): it opens with .* but the .* 2"
    )
    with pytest.raises(ArtifactError, match=message):
        audit(told / "log")


def test_the_page_says_what_was_opened_with_text(editor: Transformer, tmp_path: Path) -> None:
    samples = decoded(tmp_path, editor)
    shown = page(tmp_path / "log", 1, lambda ids: [f"<{i}>" for i in ids])
    opened = openings(tmp_path, 1)
    assert shown.count(" with text</td>") == len(opened) == len(samples[1].block_length)
    assert "open 3 with text" in shown
    assert f"&lt;{opened[0][0]}&gt;" in shown


def test_a_prompt_must_have_as_many_blocks(editor: Transformer, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"prompt 'text-1': it has 2 blocks, .* the block 3 before"
    ):
        decoded(tmp_path, editor, back=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": {"kind": "threshold"}}, "strategy `threshold` as it is set edits none"),
        (
            {"strategy": {"kind": "path"}, "sampler": {"temperature": 1.0}},
            "strategy `path` as it is set edits none",
        ),
        ({"strategy": {"kind": "abf", "operations": ["fill"]}}, "strategy `abf` as it is set"),
        ({"strategy": {"kind": "ar"}}, "strategy `ar`"),
        ({"keep": ["word"]}, r"keep=\['word'\]: extent `earlier`"),
        ({"forbidden": [3]}, r"forbidden=\[3\]: extent `earlier`"),
    ],
)
def test_what_could_do_nothing_is_refused(settings: dict[str, Any], message: str) -> None:
    whole = {"strategy": {"kind": "abf"}, "extent": {"kind": "earlier"}}
    validate(DecoderConfig, whole, "here")
    for operation in ("insert", "substitute", "delete"):
        one = {"strategy": {"kind": "abf", "operations": ["fill", operation]}}
        validate(DecoderConfig, whole | one, "here")
    with pytest.raises(ConfigError, match=message):
        validate(DecoderConfig, whole | settings, "here")
