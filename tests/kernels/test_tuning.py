"""Tile sizes are read from their files as they were written; what is wrong there is refused."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType

import pytest
import torch
from abf_kernels import tuning
from abf_kernels.block_attention import configs as attention
from abf_kernels.block_decode import configs as decode
from abf_kernels.masked_loss import configs as loss

OPERATORS = [attention, decode, loss]


@pytest.mark.parametrize("operator", OPERATORS, ids=lambda module: module.__name__)
def test_shipped_rows_are_written_as_they_are_and_name_their_source(
    operator: ModuleType, tmp_path: Path
) -> None:
    path = tmp_path / "configs.json"
    tuning.write(path, operator.ROWS.values())
    assert path.read_text(encoding="utf-8") == operator.FILE.read_text(encoding="utf-8")
    assert tuning.read(path) == operator.ROWS
    assert [p.name for p in tmp_path.iterdir()] == ["configs.json"]
    for row in operator.ROWS.values():
        assert row.source == tuning.COMPILED or row.source.startswith("measured on ")
        assert operator.CONFIGS[row.key] == operator.parse(row)


def test_architectures_without_rows_take_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    for capability, named in (((8, 0), "sm_80"), ((9, 0), "sm_90"), ((8, 9), "default")):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, c=capability: c)
        for dim, widest in ((16, 64), (64, 64), (65, 128), (128, 128)):
            found = decode.choose(cuda, torch.bfloat16, dim)
            assert found is decode.CONFIGS[named, widest, 2]
            found = decode.choose(cuda, torch.float32, dim)
            assert found is decode.CONFIGS["default", widest, 4]
            assert attention.choose(capability, widest, 2) is attention.CONFIGS[named, widest, 2]
        assert decode.choose(cuda, torch.float16, 200) is decode.CONFIGS["default", 256, 2]
        assert loss.choose(cuda, torch.float16) is loss.CONFIGS[named, 0, 2]
        assert loss.choose(cuda, torch.float32) is loss.CONFIGS["default", 0, 4]
    cpu = torch.device("cpu")
    assert loss.choose(cpu, torch.float16) is loss.CONFIGS["default", 0, 2]
    assert decode.choose(cpu, torch.float32, 64) is decode.CONFIGS["default", 64, 4]


def rows() -> list[tuning.Row]:
    tile = {"logits": {"rows": 16, "warps": 4}}
    default = tuning.Row("default", 0, 2, tile, {}, tuning.COMPILED)
    return [default, replace(default, architecture="sm_90", source="measured on X")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda entries: entries[1].pop("source"), "has the fields"),
        (lambda entries: entries.append(entries[0]), "two rows for"),
        (lambda entries: entries[1]["tiles"]["logits"].update(rows=0), "whole numbers above 0"),
        (lambda entries: entries[1]["spills"].update(dq="why"), r"no kernels \['dq'\]"),
        (lambda entries: entries.pop(0), "no default beside it"),
    ],
    ids=["fields", "twice", "zero", "spills", "default"],
)
def test_wrong_files_are_refused(tmp_path: Path, change, message: str) -> None:
    path = tmp_path / "configs.json"
    tuning.write(path, rows())
    assert list(tuning.read(path).values()) == rows()
    entries = [asdict(row) for row in rows()]
    entries = json.loads(json.dumps(entries))
    change(entries)
    path.write_text(json.dumps(entries), encoding="utf-8")
    with pytest.raises(ValueError, match=message):
        tuning.read(path)
