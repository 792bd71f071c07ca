"""Logs that are damaged or altered beneath what the events say: bytes, batches, the header."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pytest

from abf.decode.replay import replay
from abf.decode.request import Sample
from abf.decode.strategy.threshold import Threshold
from abf.decode.trace import read_trace
from abf.errors import ArtifactError
from abf.model.transformer import Transformer
from tests.decode.tiny import header, tiny_decode, tiny_engine, tiny_prompts


@pytest.fixture(scope="module")
def logged(
    model: Transformer, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Sample]]:
    path = tmp_path_factory.mktemp("log") / "trace.arrows"
    return path, tiny_decode(path, tiny_engine(model, Threshold(0.3)), tiny_prompts())


def test_no_flipped_bit_is_a_crash_or_another_text(
    logged: tuple[Path, list[Sample]], tmp_path: Path
) -> None:
    """Arrow trusts offsets and lengths: a log whose own are altered must be refused before use."""
    data = logged[0].read_bytes()
    texts = replay(logged[0])
    rng = np.random.default_rng(0)
    refused = 0
    header_too = np.append(rng.integers(0, 3000, size=150), rng.integers(0, len(data), size=250))
    for at in header_too.tolist():
        altered = bytearray(data)
        altered[at] ^= 1 << int(rng.integers(8))
        (tmp_path / "log").write_bytes(altered)
        try:
            found = replay(tmp_path / "log")
        except ArtifactError:
            refused += 1
        else:  # the wall clock, padding, a length that now reaches behind the end of the file
            assert all(ids == texts[request][: len(ids)] for request, ids in found.items())
    assert refused > 150


def test_a_damaged_batch_is_no_cut(logged: tuple[Path, list[Sample]], tmp_path: Path) -> None:
    _, table, _ = read_trace(logged[0])
    first, second = table.to_batches()[:2]
    offsets = second["type"].buffers()[1].to_pybytes()
    data = logged[0].read_bytes()
    at = data.index(offsets, data.index(first["type"].buffers()[1].to_pybytes()) + 1)
    (tmp_path / "log").write_bytes(data[: at + 6] + b"\x7f" + data[at + 7 :])
    with pytest.raises(ArtifactError, match=rf"behind its first {len(first)} events, in batch 1 "):
        read_trace(tmp_path / "log")


def test_a_wrong_header_and_what_is_appended_are_told(
    logged: tuple[Path, list[Sample]], tmp_path: Path
) -> None:
    data = logged[0].read_bytes()
    (tmp_path / "log").write_bytes(data + data)
    with pytest.raises(ArtifactError, match=f"behind its end: {len(data)} bytes"):
        read_trace(tmp_path / "log")
    other = read_trace(logged[0])[1].schema.with_metadata(header(6) | {"requests": "x"})
    with pa.OSFile(str(tmp_path / "log"), "wb") as sink, pa.ipc.new_stream(sink, other):
        pass
    with pytest.raises(ArtifactError, match="header's requests is 'x', no number"):
        read_trace(tmp_path / "log")


@pytest.mark.parametrize("name", ["mask_id", "document_id", "requests", "more"])
def test_another_header_does_not_fit_the_chain(
    logged: tuple[Path, list[Sample]], tmp_path: Path, name: str
) -> None:
    said, table, _ = read_trace(logged[0])
    told = said | {name: str(int(said.get(name, "0")) + 1)}
    if name == "requests":  # one taken out, and the number with it
        told[name] = str(int(said[name]) - 1)
        table = table.filter(pa.compute.not_equal(table["request"], 2))
    schema = table.schema.with_metadata(told)
    with pa.OSFile(str(tmp_path / "log"), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        stream.write_table(table.replace_schema_metadata(told))
    with pytest.raises(ArtifactError, match=r"request 0, seq 0 .*or the header was altered"):
        replay(tmp_path / "log")
