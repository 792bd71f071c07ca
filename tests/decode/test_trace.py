"""The log gives the text back; damage is named; a cut tail is a state that can be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from abf.base import build
from abf.decode.config import AbfStrategy, FixedExtent
from abf.decode.edits import Edits
from abf.decode.replay import replay
from abf.decode.request import RequestState, Sample
from abf.decode.strategy.ar import Ar
from abf.decode.strategy.threshold import Threshold
from abf.decode.trace import FLUSH_TOKENS, TraceWriter, read_trace
from abf.errors import ArtifactError
from abf.model.transformer import Transformer
from tests.decode.tiny import header, tiny_decode, tiny_engine, tiny_prompts


@pytest.fixture(scope="module")
def logged(
    model: Transformer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Sample]]:
    path = tmp_path_factory.mktemp("log") / "trace.arrows"
    return path, tiny_decode(path, tiny_engine(model, Threshold(0.3)), tiny_prompts())


def rewrite(source: Path, target: Path, change: Any) -> dict[str, Any]:
    """Write the log again with its rows changed by `change(rows)`; returns what that returned."""
    _, table, _ = read_trace(source)
    rows = table.to_pylist()
    found = change(rows)
    changed = pa.Table.from_pylist(rows, schema=table.schema)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(changed)
    return found


def test_replay_is_the_text(logged: tuple[Path, list[Sample]]) -> None:
    path, samples = logged
    metadata, table, complete = read_trace(path)
    assert complete
    assert metadata["requests"] == "6"
    assert table["wall_s"].to_pylist() == sorted(table["wall_s"].to_pylist())
    assert replay(path) == {s.request: s.token_ids.tolist() for s in samples}


FIELDS = [
    ("FILL", "new_id", lambda v: (v + 1) % 90),
    ("FILL", "uid", lambda v: v + 1),
    ("FILL", "prob", lambda v: v * 0.5),
    ("FILL", "entropy", lambda v: v + 1),
    ("FILL", "threshold", lambda v: v + 0.1),
    ("FILL", "alt_probs", lambda v: [v[0] / 2, *v[1:]]),
    ("FILL", "alt_ids", lambda v: [*v[:-1], v[-1] + 1]),
    ("FILL", "alt_ids", lambda v: v[:-1]),
    ("COMMIT", "type", lambda v: "FILL"),
    ("COMMIT", "step", lambda v: v + 1),
    ("COMPLETE", "type", lambda v: "FORCED_COMPLETE"),
    ("COMPLETE", "length", lambda v: v - 1),
    ("COMPLETE", "nfe", lambda v: v + 1),
    ("KV_WRITE", "prob", lambda v: v + 0.01),
    ("PROMPT", "new_id", lambda v: v + 1),
    ("OPEN", "length", lambda v: v + 1),
    ("INSERT", "left_uid", lambda v: v - 1),
    ("END", "length", lambda v: v + 1),
    ("FILL", "state_hash", lambda v: "0" * len(v)),
    ("FILL", "type", lambda v: "MYSTERY"),
]


@pytest.mark.parametrize(("kind", "field", "change"), FIELDS, ids=lambda v: str(v)[:12])
def test_a_changed_field_is_named(
    logged: tuple[Path, list[Sample]], tmp_path: Path, kind: str, field: str, change: Any
) -> None:
    def alter(rows: list[dict[str, Any]]) -> dict[str, Any]:
        row = [r for r in rows if r["type"] == kind and r["request"] == 3][-1]
        before = dict(row)
        row[field] = change(row[field])
        return before

    row = rewrite(logged[0], tmp_path / "log", alter)
    with pytest.raises(
        ArtifactError, match=rf"/log: first bad event is request 3, seq {row['seq']} \("
    ):
        replay(tmp_path / "log")


EDITED = [
    ("DELETE", "uid", lambda v: v + 1),
    ("DELETE", "gate", lambda v: v / 2),
    ("DELETE", "old_id", lambda v: v - 1),
    ("SUBSTITUTE", "new_id", lambda v: (v + 1) % 90),
    ("SUBSTITUTE", "type", lambda v: "FILL"),
    ("INSERT", "gate", lambda v: v + 1),
    ("INSERT", "left_uid", lambda v: v - 1),
    ("STALLED_COMPLETE", "type", lambda v: "COMPLETE"),
    ("COMPLETE", "gate", lambda v: v / 2),
    ("REOPEN", "prob", lambda v: v / 2),
    ("REOPEN", "length", lambda v: v + 1),
]


@pytest.fixture(scope="module")
def edited(editor: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("edited") / "trace.arrows"
    strategy = build(AbfStrategy(fill=0.4, substitute=0.2, delete=0.4), room="abf.decode.strategy")
    tiny_decode(path, tiny_engine(editor, strategy, reopen=-2.0), tiny_prompts(4))
    return path


@pytest.mark.parametrize(("kind", "field", "change"), EDITED, ids=lambda v: str(v)[:12])
def test_a_changed_field_of_an_edit_is_named(
    edited: Path, tmp_path: Path, kind: str, field: str, change: Any
) -> None:
    def alter(rows: list[dict[str, Any]]) -> dict[str, Any]:
        rows = [r for r in rows if r["type"] == kind and r["request"] == 3]
        row = [r for r in rows if r[field] == r[field]][-1]  # a reopened block's masks: no gate
        before = dict(row)
        row[field] = change(row[field])
        return before

    row = rewrite(edited, tmp_path / "log", alter)
    with pytest.raises(
        ArtifactError, match=rf"/log: first bad event is request 3, seq {row['seq']} \("
    ):
        replay(tmp_path / "log")


def test_a_missing_and_a_moved_event_are_named(
    logged: tuple[Path, list[Sample]], tmp_path: Path
) -> None:
    def remove(rows: list[dict[str, Any]]) -> dict[str, Any]:
        at = [i for i, r in enumerate(rows) if r["type"] == "COMMIT" and r["request"] == 2][5]
        return rows.pop(at)

    row = rewrite(logged[0], tmp_path / "log", remove)
    with pytest.raises(ArtifactError, match=rf"request 2, seq {row['seq'] + 1} .*missing"):
        replay(tmp_path / "log")

    def swap(rows: list[dict[str, Any]]) -> dict[str, Any]:
        one, two = [i for i, r in enumerate(rows) if r["type"] == "INSERT"][3:5]
        rows[one], rows[two] = rows[two], rows[one]
        return rows[one]

    row = rewrite(logged[0], tmp_path / "log", swap)
    with pytest.raises(ArtifactError, match=rf"seq {row['seq']} .*out of order"):
        replay(tmp_path / "log")


def test_a_log_that_does_not_tell_what_the_engine_did(
    model: Transformer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its own hashes fit its events, but not the state they were taken from."""
    real = RequestState.apply

    def other(self: RequestState, edits: Edits) -> None:
        real(self, edits)
        assert self.block is not None
        self.block.ids[edits.write[0]] = (edits.tokens[0] + 1) % 90 + 1

    monkeypatch.setattr(RequestState, "apply", other)
    tiny_decode(tmp_path / "log", tiny_engine(model, Threshold(0.3)), tiny_prompts(2))
    with pytest.raises(
        ArtifactError, match=r"request \d, seq \d+ .*the state, or the header was altered"
    ):
        replay(tmp_path / "log")


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9, 0.99])
def test_a_cut_log_is_readable_up_to_the_cut(
    logged: tuple[Path, list[Sample]], tmp_path: Path, share: float
) -> None:
    path, samples = logged
    data = path.read_bytes()
    cut = tmp_path / "log"
    cut.write_bytes(data[: int(len(data) * share)])
    _, table, complete = read_trace(cut)
    assert not complete
    assert len(table) > 0
    for request, ids in replay(cut).items():
        assert ids == samples[request].token_ids[: len(ids)].tolist()


def test_a_log_cut_between_batches_is_incomplete(
    logged: tuple[Path, list[Sample]], tmp_path: Path
) -> None:
    _, table, _ = read_trace(logged[0])
    batches = table.to_batches()
    path = str(tmp_path / "log")
    with pa.OSFile(path, "wb") as sink, pa.ipc.new_stream(sink, table.schema) as stream:
        for batch in batches[:-1]:
            stream.write_batch(batch)
    assert read_trace(tmp_path / "log")[2] is False


@pytest.mark.parametrize("strategy", [Threshold(0.3), Ar()], ids=["blocks", "tokens"])
def test_closed_blocks_reach_the_disk(model: Transformer, tmp_path: Path, strategy: Any) -> None:
    """What a killed process leaves behind: the file as it stands after each forward pass."""
    lost: list[int] = []

    class Watching(TraceWriter):
        def closed(self, tokens: int) -> None:
            super().closed(tokens)
            _, table, _ = read_trace(self.path)
            written = table["type"].to_pylist().count("KV_WRITE")
            lost.append(sum(map(len, read_tokens)) - written)

    read_tokens: list[Any] = []
    real = RequestState.written

    def counting(self: RequestState, log_probs: Any) -> None:
        read_tokens.append(log_probs)
        real(self, log_probs)

    with (
        pytest.MonkeyPatch.context() as patch,
        Watching(tmp_path / "log", header(2)) as trace,
    ):
        patch.setattr(RequestState, "written", counting)
        length = 1 if isinstance(strategy, Ar) else 18
        extent = build(FixedExtent(length=length), room="abf.decode.extent")
        engine = tiny_engine(model, strategy, extent=extent)
        engine.run(tiny_prompts(2), new_tokens=30, trace=trace)
    assert max(lost) < FLUSH_TOKENS
    assert 0 in lost[:-1]


def test_no_log_and_no_header(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="log is missing"):
        read_trace(tmp_path / "log")
    (tmp_path / "log").write_bytes(b"not an event log")
    with pytest.raises(ArtifactError, match="no readable header"):
        read_trace(tmp_path / "log")
    (tmp_path / "log").write_bytes(b"")
    with pytest.raises(ArtifactError, match="no readable header"):
        read_trace(tmp_path / "log")


def test_another_schema_is_named(tmp_path: Path) -> None:
    schema = pa.schema([("request", pa.int32())])
    with pa.OSFile(str(tmp_path / "log"), "wb") as sink, pa.ipc.new_stream(sink, schema):
        pass
    with pytest.raises(ArtifactError, match="block: found nothing, expected int32"):
        read_trace(tmp_path / "log")


def test_an_unfinished_decode_leaves_no_end_marker(model: Transformer, tmp_path: Path) -> None:
    class Broken(Threshold):
        def decide(self, view: Any, state: None) -> Any:
            if view.block == 2:
                raise RuntimeError("killed")
            return super().decide(view, state)

    with pytest.raises(RuntimeError, match="killed"):
        tiny_decode(tmp_path / "log", tiny_engine(model, Broken(0.3)), tiny_prompts())
    _, table, complete = read_trace(tmp_path / "log")
    assert not complete
    assert np.count_nonzero(table["type"].to_numpy() == "COMPLETE") > 0
    assert all(len(ids) <= 12 for ids in replay(tmp_path / "log").values())
