"""Promises of the layout: variants are files, links are alive, nothing private is committed."""

from __future__ import annotations

import re
import subprocess
import typing
from pathlib import Path

import pytest

from abf.checked import members
from abf.data.config import Source, Tokenizer
from abf.decode.config import Extent, Strategy
from abf.diffusion.config import Corruption
from abf.eval.config import Task
from abf.model.config import FamilyName
from abf.segment.config import Segmenter

ROOT = Path(__file__).parents[1]
NOT_VARIANTS = {
    "abf/segment": {"__init__", "base", "config"},
    "abf/diffusion/corrupt": {"__init__", "base"},
    "abf/decode/extent": {"__init__", "base"},
    "abf/decode/strategy": {"__init__", "base"},
}


def kinds(union: object) -> set[str]:
    return {member.model_fields["kind"].default for member in members(union)}


@pytest.mark.parametrize(
    ("folder", "union"),
    [
        ("abf/segment", Segmenter),
        ("abf/diffusion/corrupt", Corruption),
        ("abf/decode/extent", Extent),
        ("abf/decode/strategy", Strategy),
    ],
)
def test_every_kind_is_a_file_and_every_file_a_kind(folder: str, union: object) -> None:
    files = {path.stem for path in (ROOT / folder).glob("*.py")} - NOT_VARIANTS[folder]
    assert files == kinds(union)


def test_every_task_kind_is_a_file() -> None:
    files = {path.stem for path in (ROOT / "abf" / "eval").glob("*.py")}
    assert kinds(Task) <= files


def test_every_family_of_checkpoints_is_a_file() -> None:
    files = {path.stem for path in (ROOT / "abf" / "model" / "families").glob("*.py")}
    assert files - {"__init__", "base"} == set(typing.get_args(FamilyName))


def test_unions_are_told_apart_by_kind() -> None:
    for union in (Source, Tokenizer, Segmenter, Strategy, Extent, Task):
        names = [m.model_fields["kind"].default for m in members(union)]
        assert len(names) == len(set(names))
        assert typing.get_origin(union) is typing.Annotated


def tracked(*patterns: str) -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [ROOT / name for name in listed.split("\0") if name]


def test_links_between_documents_are_alive() -> None:
    dead = []
    for page in tracked("*.md"):
        for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
            if (
                not target.startswith(("http://", "https://", "mailto:"))
                and not (page.parent / target).exists()
            ):
                dead.append(f"{page.relative_to(ROOT)}: {target}")
    assert dead == []


def test_what_the_method_says_is_proved_by_a_test_is() -> None:
    """Every file and function that the tables of docs/method.md name."""
    page = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    named = re.findall(r"`([\w/]+\.py)(?:::(\w+))?`", page.partition("## 12. What proves it")[2])
    assert len(named) > 60
    for file, function in named:
        source = (ROOT / "tests" / file).read_text(encoding="utf-8")
        wanted = rf"{function}\(" if function else r"test_\w+\("
        assert re.search(rf"^def {wanted}", source, re.MULTILINE), (file, function)


def test_no_large_file_is_tracked() -> None:
    large = [p.name for p in tracked() if p.exists() and p.stat().st_size > 1_000_000]
    assert large == []


def test_room_packages_hold_only_a_docstring() -> None:
    for path in [*(ROOT / "abf").rglob("__init__.py"), *(ROOT / "kernels").rglob("__init__.py")]:
        lines = [line for line in path.read_text().splitlines() if line]
        limit = 2 if path.parent == ROOT / "abf" else 1
        assert len(lines) <= limit, path
        assert lines[0].startswith('"""'), path
