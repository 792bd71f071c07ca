"""The logs in docs/generations/ can be read and audited with this code, and are what they say."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from abf.decode.audit import audit
from abf.decode.replay import replay

FOLDER = Path(__file__).parents[2] / "docs" / "generations"
SHOWN = ("FILL", "INSERT", "SUBSTITUTE", "DELETE", "COMPLETE", "FORCED_COMPLETE")
LOGS = sorted(FOLDER.glob("*.arrows"))


def test_every_log_has_its_line_and_its_page() -> None:
    text = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"`([\w-]+\.arrows)`", text)) == {path.name for path in LOGS}
    assert {path.with_suffix(".html") for path in LOGS} == set(FOLDER.glob("*.html"))


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_a_log_holds_what_its_line_says(path: Path) -> None:
    line = next(
        line
        for line in (FOLDER / "README.md").read_text().splitlines()
        if line.startswith(f"| `{path.name}`")
    )
    found = audit(path)
    assert found.complete
    told = {kind: int(count) for count, kind in re.findall(r"(\d+) ([A-Z_]+)", line)}
    assert told == {kind: found.events[kind] for kind in SHOWN}
    assert f"{found.requests} requests" in line
    assert f"{found.tokens} tokens" in line
    assert sum(map(len, replay(path).values())) == found.tokens


@pytest.mark.parametrize("path", LOGS, ids=lambda path: path.stem)
def test_a_page_names_no_machine(path: Path) -> None:
    assert path.name in (page := path.with_suffix(".html").read_text())
    assert not re.search(r'(?:^|[\s"])/(?:work|tmp|home|root)/', page)
