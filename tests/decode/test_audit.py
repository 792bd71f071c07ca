"""`abf audit`: logs that hold, were cut or altered, or are another model's; and the page."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import torch

from abf import cli
from abf.base import build
from abf.decode.audit import audit
from abf.decode.config import (
    AbfStrategy,
    ArStrategy,
    FixedExtent,
    PathStrategy,
    SamplerConfig,
    ThresholdStrategy,
)
from abf.decode.controls import Controls
from abf.decode.page import page
from abf.decode.trace import TraceWriter, read_trace
from abf.errors import ArtifactError, ConfigError
from abf.files import sha256
from abf.model.store import WEIGHTS, load_model, save_model, with_granularities
from abf.model.transformer import Transformer
from tests.decode.tiny import header, tiny_engine, tiny_prompts

BUSY = AbfStrategy(fill=0.4, substitute=0.2, delete=0.4, complete=0.2)


def decoded(
    folder: Path,
    model: Transformer,
    strategy: Any = BUSY,
    *,
    told: dict[str, str] | None = None,
    **changes: Any,
) -> Path:
    """A log with the header that the decode stage writes, `told` in it; the model is in
    `folder`/model."""
    save_model(model, folder / "model")
    alone = strategy.kind == "ar"
    shift = changes.pop("shift", True)
    more = {
        "shift": str(shift).lower(),
        "clean_stream": changes.get("clean_stream", "context_causal"),
        "dtype": changes.get("precision", "fp32"),
        "decoder": json.dumps(
            {
                "extent": None if alone else {"kind": "fixed"},
                "granularity": changes.get("granularity"),
            }
        ),
        "model_sha256": sha256(folder / "model" / WEIGHTS),
    }
    if alone:
        changes["extent"] = build(FixedExtent(length=1), room="abf.decode.extent")
    built = build(strategy, room="abf.decode.strategy")
    engine = tiny_engine(model, built, shift=shift or alone, **changes)
    with TraceWriter(folder / "log", header(3, **more | (told or {}))) as trace:
        engine.run(tiny_prompts(3), new_tokens=20, trace=trace)
    return folder / "log"


CASES: dict[str, dict[str, Any]] = {
    "abf": {},
    "abf, own rows": {"shift": False},
    "locks": {"strategy": AbfStrategy(fill=0.4, substitute=0.1, lock_after=1, complete=0.9)},
    "reopened": {"reopen": -2.0},
    "kept": {"controls": Controls(forbidden=(5, 9), keep=((7, 8),))},
    "hot": {"sampler": SamplerConfig(temperature=1.0, top_p=0.8)},
    "block-causal": {"clean_stream": "block_causal"},
    "bf16": {"precision": "bf16"},
    "path": {"strategy": PathStrategy(steps=6), "sampler": SamplerConfig(temperature=1.0)},
    "threshold": {"strategy": ThresholdStrategy(threshold=0.3)},
    "ar": {"strategy": ArStrategy(), "shift": False},
    "told": {"granularity": 9},
    "told, own rows": {"granularity": 9, "shift": False},
}


@pytest.mark.parametrize("name", CASES)
def test_the_model_says_what_was_logged(editor: Transformer, tmp_path: Path, name: str) -> None:
    model = with_granularities(editor, (3, 9)) if "told" in name else editor
    if model is not editor:
        with torch.no_grad():
            model.granularity_input.normal_(0, 1, generator=torch.Generator().manual_seed(1))
    log = decoded(tmp_path, model, **CASES[name])
    found = audit(log, model_dir=tmp_path / "model", steps=60)
    assert found.complete
    assert found.requests == 3
    assert found.groups > 5
    assert found.checked > 5 * found.groups or name == "ar"
    assert found.largest < (0.05 if name == "bf16" else 1e-4)
    _, table, _ = read_trace(log)
    assert sum(found.events.values()) == len(table)


def test_gates_are_among_what_is_checked(editor: Transformer, tmp_path: Path) -> None:
    """A model that differs in its edit head alone is found out, and the event named."""
    log = decoded(tmp_path, editor)
    other = load_model(tmp_path / "model")
    with torch.no_grad():
        other.edit_head.bias.add_(0.05)
    save_model(other, tmp_path / "other")
    with pytest.raises(ArtifactError, match=r"decoded by a model with sha256 \w{12}…, but .*other"):
        audit(log, model_dir=tmp_path / "other")
    log = decoded(tmp_path, editor, told={"model_sha256": sha256(tmp_path / "other" / WEIGHTS)})
    with pytest.raises(
        ArtifactError,
        match=r"first bad event is in request \d, block \d+, step \d+ \(seq \d+\): its numbers",
    ):
        audit(log, model_dir=tmp_path / "other", steps=40)


def test_a_model_that_says_nothing_is_found_out(editor: Transformer, tmp_path: Path) -> None:
    """NaN is larger than no tolerance, and differs all the same."""
    model = load_model(decoded(tmp_path, editor).parent / "model")
    with torch.no_grad():
        model.edit_head.bias.fill_(float("nan"))
    save_model(model, tmp_path / "other")
    log = decoded(tmp_path, editor, told={"model_sha256": sha256(tmp_path / "other" / WEIGHTS)})
    with pytest.raises(ArtifactError, match="its numbers differ by nan"):
        audit(log, model_dir=tmp_path / "other", steps=40)


def test_a_header_that_does_not_say_how(editor: Transformer, tmp_path: Path) -> None:
    save_model(editor, tmp_path / "model")
    engine = tiny_engine(editor, build(BUSY, room="abf.decode.strategy"))
    with TraceWriter(tmp_path / "log", header(1)) as trace:
        engine.run(tiny_prompts(1), new_tokens=6, trace=trace)
    assert audit(tmp_path / "log").checked == 0
    with pytest.raises(ArtifactError, match="does not say shift, clean_stream, dtype"):
        audit(tmp_path / "log", model_dir=tmp_path / "model")


def test_the_command(
    editor: Transformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = decoded(tmp_path, editor)
    model = str(tmp_path / "model")
    assert cli.main(["audit", str(log), "--model", model, "--steps", "9"]) == 0
    said = capsys.readouterr().out
    assert f"{log}: complete; every event follows the rules" in said
    assert re.search(r"numbers of 9 steps forwarded anew: largest difference \d", said)

    stage = ["audit", str(log), "--model", str(tmp_path)]
    assert cli.main(stage) == ArtifactError.exit_code
    assert f"{tmp_path} holds no model.safetensors" in capsys.readouterr().err
    log.write_bytes(log.read_bytes()[: int(log.stat().st_size * 0.7)])
    assert cli.main(["audit", str(log), "--model", model]) == 0
    assert f"{log}: incomplete (its tail was cut, or it was killed)" in capsys.readouterr().out

    _, table, _ = read_trace(log)
    rows = table.to_pylist()
    bad = next(r for r in rows if r["type"] == "FILL" and r["request"] == 1)
    bad["prob"] /= 2
    with pa.OSFile(str(log), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(pa.Table.from_pylist(rows, schema=table.schema))
    assert cli.main(["audit", str(log)]) == ArtifactError.exit_code
    assert f"first bad event is request 1, seq {bad['seq']} (FILL" in capsys.readouterr().err

    assert cli.main(["audit", str(tmp_path / "nothing")]) == ArtifactError.exit_code
    assert "nothing is missing" in capsys.readouterr().err
    assert cli.main(["audit", str(log), "--steps", "0"]) == ConfigError.exit_code


HOSTILE = '<script>alert(1)</script>&"\u202eمرحبا'


def test_the_page_shows_every_operation(editor: Transformer, tmp_path: Path) -> None:
    log = decoded(tmp_path, editor, reopen=-2.0)
    _, table, _ = read_trace(log)
    events = [e for e in table.to_pylist() if e["request"] == 1]
    shown = page(log, 1, lambda ids: [f"{HOSTILE}{i};" for i in ids])
    assert "<script" not in shown
    assert html.escape(HOSTILE) in shown
    # A token that writes from right to left does not turn around what stands beside it.
    apart = re.sub(r"<bdi>.*?</bdi>|<h2>(?:Prompt|Text)</h2><p>.*?</p>", "", shown)
    assert "\u202e" not in apart
    steps = [e for e in events if e["step"] >= 0]
    for kind in ("INSERT", "DELETE", "SUBSTITUTE", "FILL"):
        wanted = sum(e["type"] == kind for e in steps)
        assert shown.count(f"{kind.lower()} ") >= wanted
        spans = re.findall(rf'<span class="{kind.lower()}[ "]', shown)
        opened = sum(e["type"] == "INSERT" and e["step"] < 0 for e in events)
        legend = 1
        assert len(spans) == wanted + legend + (opened if kind == "INSERT" else 0)
    assert shown.count("<h2>Block ") == sum(e["type"] == "OPEN" for e in events)
    assert shown.count("<td>reopen</td>") == sum(e["type"] == "REOPEN" for e in events) > 0
    assert shown.count("<table>") == shown.count("</table>")
    for event in events:
        if event["type"].endswith("COMPLETE"):
            assert f"P(complete) {event['gate']:.3f}" in shown
        elif event["type"] == "DELETE":
            assert f"delete {event['gate']:.3f}" in shown
    assert "The log is incomplete" not in shown


def test_the_page_of_a_cut_log_and_of_no_request(
    editor: Transformer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log = decoded(tmp_path, editor)
    log.write_bytes(log.read_bytes()[: int(log.stat().st_size * 0.7)])
    out = tmp_path / "pages" / "page.html"  # a folder that is not there yet
    assert cli.main(["audit", str(log), "--html", str(out)]) == 0
    assert "The log is incomplete" in out.read_text(encoding="utf-8")
    asked = ["audit", str(log), "--html", str(out), "--request", "7"]
    assert cli.main(asked) == ConfigError.exit_code
    assert "has no request 7; it has 0, 1, 2" in capsys.readouterr().err
    assert cli.main(["audit", str(log), "--html", str(tmp_path)]) == ArtifactError.exit_code
