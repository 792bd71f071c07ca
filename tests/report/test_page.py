"""The page as a whole: what it says, what it escapes, and that it stands alone."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from synthetic_study import HOSTILE, make_study

from abf.artifacts import LEDGER, SCORES, read_table, write_table
from abf.errors import ArtifactError
from abf.report import svg, text
from abf.report.inputs import MissingCell, ReportPlan
from abf.report.metrics import BOUND_CUTS
from abf.report.page import build_report


class Page(HTMLParser):
    """Tags with attributes, ids, and text by enclosing tag."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.source: list[str] = []
        """Everything but what a reader sees: tags, styles, scripts."""
        self.words: list[str] = []
        self.feed(html)
        assert not self.open, f"unclosed: {self.open}"

    VOID = ("meta", "br", "input", "link", "img")

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.source.append(self.get_starttag_text() or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.source.append(self.get_starttag_text() or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> does not close {self.open}"

    def handle_data(self, data: str) -> None:
        hidden = bool(self.open) and self.open[-1] in ("style", "script")
        (self.source if hidden else self.words).append(data)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> ReportPlan:
    return make_study(tmp_path_factory.mktemp("study"), steps=20)


@pytest.fixture(scope="module")
def built(
    plan: ReportPlan, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, Any], str]:
    out = tmp_path_factory.mktemp("report")
    counts = build_report(plan, out)
    return out, counts, (out / "index.html").read_text(encoding="utf-8")


def test_counts_and_files(built: tuple[Path, dict[str, Any], str]):
    out, counts, _ = built
    assert counts["arms"] == 3
    assert counts["cells"] == 9
    assert counts["left_out"] == 0
    assert counts["generations"] == 3 * 3 * 2
    assert sorted(path.name for path in (out / "figures").iterdir()) == [
        "bits_per_byte.svg",
        "block_lengths.svg",
        "quality_parallelism.svg",
        "training.svg",
    ]


def test_headline_holds_the_mean_over_seeds_and_its_cost(
    plan: ReportPlan, built: tuple[Path, dict[str, Any], str]
):
    html = built[2]
    values = []
    for cell in plan.cells:
        if cell.arm == "sentence":
            rows = read_table(cell.score / "scores.parquet", SCORES).to_pylist()
            values += [row["value"] for row in rows if row["metric"] == BOUND_CUTS]
    assert len(values) == 3
    assert f"<b>{text.number(float(np.mean(values)), 3)}</b>" in html
    hours = sum(
        row["core_hours"]
        for row in read_table(plan.ledger / "ledger.parquet", LEDGER).to_pylist()
        if row["run"].startswith("sentence")  # decodes too: their key begins with the run
    )
    assert f"{text.hours(hours)} core-h" in html
    assert "3 seeds, 40 documents" in html
    assert "Task likelihood, version 1" in html


def test_page_says_what_it_is(plan: ReportPlan, built: tuple[Path, dict[str, Any], str]):
    words = " ".join("".join(Page(built[2]).words).split())
    for expected in (
        plan.git_sha,
        plan.created,
        "CC-BY-SA-4.0",
        "Wikipedia contributors",
        "1,234,567 train",
        "An upper bound on the negative log-likelihood",
        "Energy: not measured (no energy meter on this machine)",
        "Scored: 40 of 51 (78 %) held-out documents: 40 of 50 from wiki-leads, none of 1 from "
        "python-stdlib.",
        "noise ±0.0074",  # 0.004, 0.007 and 0.010, root mean square
        "12 comparisons",
        "corrected for all 12 (Holm)",
        "AR view (task likelihood, version 1; 3 seeds, 40 documents)",
        "sentence − base model",
        "to 5.0e-04 (the base ended at 3.0e-05)",
        "819,200 tokens (the base: 100,000)",
        "10 of them not completed",
        "loss is nan at step 3 <b>",
        "sentence − random",
    ):
        assert expected in words, expected
    for row in read_table(plan.ledger / "ledger.parquet", LEDGER).to_pylist():
        assert row["job_id"] in words


def test_page_stands_alone(built: tuple[Path, dict[str, Any], str]):
    page = Page(built[2])
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.tags:
        assert "src" not in attributes, (tag, attributes)
        for name in ("href", "xlink:href", "action", "data", "poster", "srcset"):
            target = attributes.get(name)
            if target is not None:
                assert target.startswith("#"), (tag, target)
                assert target[1:] in ids, target
        assert tag not in ("link", "iframe", "object", "embed", "img", "base")
    source = "".join(page.source)
    assert "//" not in re.sub(r"^\s*//.*$", "", source, flags=re.MULTILINE)
    assert "@import" not in source
    assert "url(" not in re.sub(r"url\(#[^)]*\)", "", source)


def test_model_text_is_escaped(built: tuple[Path, dict[str, Any], str]):
    page = Page(built[2])
    assert HOSTILE[:16] in "".join(page.words)
    assert len([tag for tag, _ in page.tags if tag == "script"]) == 1
    assert "alert(" not in re.search(r"<script>(.*?)</script>", built[2], re.DOTALL).group(1)  # type: ignore[union-attr]
    assert not [tag for tag, _ in page.tags if tag == "img"]


def test_same_inputs_give_the_same_page(
    plan: ReportPlan, built: tuple[Path, dict[str, Any], str], tmp_path: Path
):
    build_report(plan, tmp_path)
    for path in sorted(built[0].rglob("*")):
        if path.is_file():
            assert path.read_bytes() == (tmp_path / path.relative_to(built[0])).read_bytes()


def test_one_cell_without_decoders(tmp_path: Path):
    plan = make_study(tmp_path / "study", arms=["only"], seeds=[7], decoders=[], steps=3)
    counts = build_report(plan, tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert counts["generations"] == 0
    assert counts["left_out"] == 0
    assert "noise" in page
    assert "seeds none, n = 1" in page
    Page(page)


def test_arm_without_cost_is_left_out(plan: ReportPlan, tmp_path: Path):
    table = pq.read_table(plan.ledger / "ledger.parquet")
    kept = [row for row in table.to_pylist() if not row["run"].startswith("random")]
    write_table(
        tmp_path / "ledger" / "ledger.parquet", pa.Table.from_pylist(kept, schema=LEDGER), LEDGER
    )
    counts = build_report(replace(plan, ledger=tmp_path / "ledger"), tmp_path / "out")
    page = (tmp_path / "out" / "index.html").read_text()
    assert counts["left_out"] > 0
    assert "no cost on record for this arm" in page
    assert "random − fixed" not in page


def test_cells_that_are_missing_are_named_and_cost(
    plan: ReportPlan, built: tuple[Path, dict[str, Any], str], tmp_path: Path
):
    gone = [c for c in plan.cells if c.arm == "random" or (c.arm, c.seed) == ("sentence", 2)]
    missing = [MissingCell(f"{c.arm}-s{c.seed}", f"lost {HOSTILE}", c) for c in gone]
    kept = [cell for cell in plan.cells if cell not in gone]
    counts = build_report(replace(plan, cells=kept, missing=missing), tmp_path)
    page = (tmp_path / "index.html").read_text()
    assert (counts["arms"], counts["cells"]) == (2, 5)
    words = " ".join("".join(Page(page).words).split())
    assert "Not finished: 4 of 9 cells." in words
    for cell in missing:
        assert f"{cell.name}: lost {HOSTILE}" in words
    assert "Not finished" not in built[2]
    # What they cost is charged to their arms, not to what all share: the sums are the whole page's.
    sums = re.compile(r'<tr><td class="l"><b>.*?</b></td>(.*?)</tr>', re.DOTALL)
    assert len(sums.findall(page)) == 6  # base, three arms, shared, total
    assert sorted(sums.findall(page)) == sorted(sums.findall(built[2]))


def test_arms_that_train_on_no_bound_are_named(
    plan: ReportPlan, built: tuple[Path, dict[str, Any], str], tmp_path: Path
):
    cells = [replace(cell, bound=cell.arm == "fixed") for cell in plan.cells]
    build_report(replace(plan, cells=cells), tmp_path)
    words = " ".join("".join(Page((tmp_path / "index.html").read_text()).words).split())
    assert "The block loss of random, sentence has other weights than the bound" in words
    assert "not a likelihood bound" not in built[2]


def test_nothing_to_report_is_said(plan: ReportPlan, tmp_path: Path):
    with pytest.raises(ArtifactError, match="study tiny has no cell"):
        build_report(replace(plan, cells=[]), tmp_path)


def test_missing_scores_are_named(plan: ReportPlan, tmp_path: Path):
    cell = replace(plan.cells[0], score=tmp_path / "gone")
    with pytest.raises(ArtifactError, match=r"gone/scores\.parquet is missing"):
        build_report(replace(plan, cells=[cell]), tmp_path / "out")


def test_figures_stay_themselves_outside_the_page(built: tuple[Path, dict[str, Any], str]):
    for path in (built[0] / "figures").iterdir():
        drawing = path.read_text()
        assert "var(--" not in drawing
        assert svg.PAPER in drawing
        inlined = svg.inline(drawing, "x")
        assert svg.INK not in inlined
        assert svg.PAPER not in inlined
        assert 'id="x-' in inlined
        assert "xmlns" not in inlined
