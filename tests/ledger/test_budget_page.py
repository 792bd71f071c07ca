"""What `abf budget` prints: forecasts, months, users and the site's own books."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, date, datetime
from pathlib import Path

import pytest

from abf.budget import show_budget
from abf.cli import main
from abf.cluster.config import AllocationConfig, SiteConfig
from abf.errors import BudgetError
from abf.ledger.books import months, open_books
from abf.plan import Plan
from tests.ledger.accounting import NOW, RUN, SITE, line


def finish(directory: Path, **counts: int) -> None:
    from abf.stages import STAGES

    (directory / ".done").mkdir(parents=True)
    version = STAGES[directory.parent.name].version
    document = {
        "stage": directory.parent.name, "stage_version": version, "config": None, "inputs": {},
        "counts": counts, "files": {}, "started": 0.0, "seconds": 1.0,
    }  # fmt: skip
    (directory / ".done/manifest.json").write_text(json.dumps(document))


def test_without_any_measurement_a_calibration_run_is_asked_for(
    plan: Callable[..., Plan], tmp_path: Path, records: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr("abf.budget.load_site", lambda: SITE)
    monkeypatch.chdir(tmp_path)
    score = plan().cells[0].score.place
    assert main(["budget", "run.yaml"]) == 0
    page = capsys.readouterr().out
    assert "no forecast for 1 base ar, 1 convert" in page
    assert "none was measured on these nodes. Calibrate with one cell:" in page
    assert f"study=run.yaml results=results -- results/{score}/manifest.json" in page
    assert "interval" not in page


def test_the_forecast_is_from_what_the_scheduler_billed(
    plan: Callable[..., Plan], tmp_path: Path, records: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr("abf.budget.load_site", lambda: SITE)
    done = plan(RUN.replace("tokens: 2560", "tokens: 1280")).cells[0]
    base = f"abf {done.base.place}".replace("/", " ", 1)
    train = f"abf {done.train.place}".replace("/", " ", 1)
    results = tmp_path / "results"
    finish(done.base.directory(results), tokens=2000, parameters=1000)
    finish(done.train.directory(results), tokens=1280)
    # Two attempts: what the first lost is part of the price.
    records(
        line(comment=base, job_id="6"),
        line(comment=train, elapsed=1800, state="REQUEUED"),
        line(comment=train, elapsed=5400, submit=NOW - 3000),
    )
    plan()  # twice the tokens: another training, the same base
    books = open_books(results, SITE, "small")
    (kind,) = books.forecast.kinds
    assert (kind.kind, kind.directories, kind.measurements) == ("train block", 1, 1)
    assert kind.median_node_hours == pytest.approx(4.0)
    assert kind.high_node_hours == pytest.approx(8.0)
    # Half of it is in a checkpoint.
    (results / books.wanted[0]["cells"][0]["train"] / "ckpt/step-00000002").mkdir(parents=True)
    half = open_books(results, SITE, "small").forecast
    tokens = 2 * 8 * 64
    assert half.median_node_hours == pytest.approx(4.0 * (2560 - tokens) / 2560)
    plan(RUN + "budget: {cap_node_hours: 5.5}\n")
    code = main(["budget", str(tmp_path / "run.yaml"), "--results", str(results)])
    assert code == BudgetError.exit_code == 9
    printed = capsys.readouterr()
    assert "what is left of small does not fit the cap of study small: 1.00 spent + " in printed.err
    assert "forecast (upper end)" in printed.err
    assert "90% interval" in printed.out


def test_months_states_users_and_the_plot(
    plan: Callable[..., Plan], tmp_path: Path, records: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    site = SiteConfig(
        account="euhpc_test",
        allocation=AllocationConfig(node_hours=212, start=date(2025, 9, 1), end=date(2026, 3, 31)),
    )
    monkeypatch.setattr("abf.budget.load_site", lambda: site)
    midnight = int(datetime(2025, 10, 1, tzinfo=UTC).timestamp())
    before = int(datetime(2025, 9, 1, tzinfo=UTC).timestamp())
    records(
        line(start=midnight - 900, end=midnight + 2700),
        line(job_id="8", start=before - 1800, end=before + 1800, state="CANCELLED by 12"),
        line(job_id="9", start=midnight, end=midnight + 40 * 3600, elapsed=40 * 3600, user="bob",
             state="FAILED"),
    )  # fmt: skip
    plan()
    books = open_books(tmp_path / "results", site)
    found = months(books)
    assert [m.name for m in found] == [f"2025-{m:02}" for m in (9, 10, 11, 12)] + [
        "2026-01", "2026-02", "2026-03",
    ]  # fmt: skip
    # 212 days, 212 node-hours: a month's share is its days; what ran before is not counted.
    assert [m.share_node_hours for m in found] == pytest.approx([30, 31, 30, 31, 31, 28, 31])
    assert [m.spent_node_hours for m in found[:3]] == pytest.approx([0.75, 40.75, 0])
    assert books.used.spent_node_hours == pytest.approx(41.5)
    show_budget(tmp_path / "results", None, tmp_path / "plot.svg")
    page = capsys.readouterr().out
    words = [" ".join(text.split()) for text in page.splitlines()]
    assert "FAILED 40.00 1" in words
    assert "CANCELLED 0.50 1" in words
    assert "bob 40.00 1" in words
    (october,) = [text for text in words if text.startswith("2025-10")]
    assert october.startswith("2025-10 40.75 31.00 170.50 151.00 WARNING: above its share")
    assert "2025-10" in (tmp_path / "plot.svg").read_text()


SALDO = """\
-----------------------------------------------------------------------------------------------
account    start     end       total localCluster totConsumed totConsumed monthTotal monthConsumed
                        (local h) Consumed(local h) (local h)           %  (local h)     (local h)
-----------------------------------------------------------------------------------------------
euhpc_test {start} {end} {total}         {consumed}       {consumed}       0.0 1067 64
"""


@pytest.mark.parametrize(
    ("consumed", "total", "expected"),
    [
        (64, 3200, "64 core-hours = 2.00 node-hours, sacct: 2.00; difference 0.00, explained"),
        (32, 3200, "difference 1.00, explained by what ran in the last day (2.00)"),
        (640, 3200, "difference -18.00, WARNING"),
        (64, 6400, "WARNING: saldo grants 200.00 node-hours, the site file says"),
    ],
)
def test_the_sites_own_books_are_held_against_ours(
    consumed: int, total: int, expected: str, tmp_path: Path, records: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    monkeypatch.setattr("abf.budget.load_site", lambda: SITE)
    text = SALDO.format(start="20250901", end="20260331", total=total, consumed=consumed)
    records(line(), line(job_id="8"), saldo=text)
    show_budget(tmp_path / "results", None, None)
    assert expected in capsys.readouterr().out
