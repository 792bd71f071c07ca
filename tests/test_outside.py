"""Sources and checkpoints that no job could use are refused by every command that plans."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abf.cli import main

LOCAL = "study: s\nsources: [{kind: local, path: '%s'}]\n"
IMPORT = """
study: s
base: {kind: import, checkpoint: {kind: directory, path: '%s'}}
tokenizer: {kind: checkpoint}
"""


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """The two files that are looked at."""
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text(json.dumps({"max_position_embeddings": 512}))
    return folder


@pytest.fixture
def told(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    """What `config`, `plan`, `drive start` and `doctor` say of a study, having refused it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ABF_SITE", str(tmp_path / "no site"))
    (tmp_path / "Snakefile").touch()

    def say(text: str) -> str:
        (tmp_path / "run.yaml").write_text(text)
        said = []
        for command in (["config"], ["plan"], ["drive", "start"]):
            assert main([*command, "run.yaml"]) == 2
            said.append(capsys.readouterr().err.removeprefix(f"abf {command[0]}: ").strip())
        assert main(["doctor", "run.yaml"]) == 1
        page = capsys.readouterr().out.splitlines()
        said.append(next(x for x in page if x.startswith("FAIL  study")).split(maxsplit=2)[2])
        assert len(set(said)) == 1, said
        assert not (tmp_path / "results" / "plan").exists()
        return said[0]

    return say


def test_local_files_that_are_not_there(told, tmp_path: Path) -> None:
    pattern = f"{tmp_path}/*.txt"
    assert told(LOCAL % pattern) == (
        f"run.yaml:2: sources[0].path: no file matches {pattern!r}: correct it"
    )
    (tmp_path / "a.txt").write_text("text")
    (tmp_path / "run.yaml").write_text(LOCAL % pattern)
    assert main(["config", "run.yaml"]) == 0


def test_a_checkpoint_that_is_none(told, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    assert f"base.checkpoint.path: '{checkpoint}' has no tokenizer.json" in told(
        IMPORT % checkpoint
    )
    (checkpoint / "tokenizer.json").touch()
    (checkpoint / "config.json").write_text("{")
    assert f"'{checkpoint}': config.json is not JSON" in told(IMPORT % checkpoint)
    assert "'/nowhere' has no config.json and no tokenizer.json" in told(IMPORT % "/nowhere")


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions"])
def test_rows_longer_than_the_checkpoints_context(
    told, checkpoint: Path, tmp_path: Path, key: str
) -> None:
    """RoPE, and a table of positions."""
    (checkpoint / "config.json").write_text(json.dumps({key: 512}))
    longer = IMPORT % checkpoint + "pack: {row_length: 513}\n"
    assert told(longer) == (
        f"run.yaml:5: pack.row_length=513 is longer than the context of '{checkpoint}' "
        f"({key}=512): lower it"
    )
    (tmp_path / "run.yaml").write_text(longer.replace("513", "512"))
    assert main(["config", "run.yaml"]) == 0
