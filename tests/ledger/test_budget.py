"""Caps, reservations and the printed books, with stand-ins for the scheduler's commands."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from abf.budget import months, open_books, show_budget
from abf.cli import main
from abf.cluster.config import AllocationConfig, LaunchConfig, SiteConfig
from abf.cluster.history import _FIELDS, Attempt, parse
from abf.cluster.slurm import SEPARATOR
from abf.errors import BudgetError, ClusterError, ConfigError
from abf.grid import load_study
from abf.ledger.budget import (
    check_dates,
    committed_node_hours,
    job_node_hours,
    spent_node_hours,
)
from abf.ledger.reserve import allow, open_reservations
from abf.plan import Plan

NOW = int(time.time())
TODAY = datetime.fromtimestamp(NOW, UTC).date()
RUN = """
study: small
sources: [{kind: stdlib, pattern: "[a-f]*.py", max_documents: 16}]
tokenizer: {kind: trained, vocab_size: 400}
pack: {row_length: 64, max_block: 16}
base: {kind: pretrain, train: {objective: {kind: ar}, tokens: 2000, precision: fp32}}
train: {tokens: 2560, precision: fp32}
launch: {nodes: 2, minutes: 30}
tasks: {heldout: {kind: likelihood}}
"""
ALLOCATION = {"node_hours": 100.0, "start": TODAY - timedelta(10), "end": TODAY + timedelta(80)}
SITE = SiteConfig(
    account="euhpc_test", allocation=AllocationConfig(**ALLOCATION), poll_seconds=0.01
)


def line(**changes: Any) -> str:
    """A record as sacct prints it; by default a node for an hour, completed."""
    tres = "billing=32,cpu=32,gres/gpu=4,mem=494000M,node=1"
    values = dict.fromkeys(_FIELDS, "") | {
        "cluster": "leonardo", "job_id": "7", "user": "anna", "name": "job", "state": "COMPLETED",
        "account": "euhpc_test", "submit": NOW - 7200, "start": NOW - 7200, "end": NOW - 3600,
        "elapsed": 3600, "limit": 1440, "tres": tres, "requested": tres, "workdir": Path.cwd(),
        "energy": "0", "reason": "None", "exit_code": "0:0",
    }  # fmt: skip
    values |= {"shown_id": values["job_id"]} | changes
    assert values.keys() == _FIELDS.keys()
    return SEPARATOR.join(str(values[name]) for name in _FIELDS) + "\n"


def waiting(**changes: Any) -> str:
    state = {"state": "PENDING", "start": "Unknown", "end": "Unknown", "elapsed": 0, "tres": ""}
    return line(**(state | changes))


def attempt(text: str) -> Attempt:
    (found,) = parse(text)
    return found


@pytest.fixture
def records(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let sacct print these lines, squeue nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.chdir(tmp_path)

    def write(*lines: str, queue: str = "", **commands: str) -> None:
        texts = {"sacct": "".join(lines), "squeue": queue, **commands}
        for name, text in texts.items():
            (folder / f"{name}.txt").write_text(text)
            (folder / name).write_text(
                f"#!/bin/sh\necho call >> {folder}/{name}.calls\ncat {folder}/{name}.txt\n"
            )
            (folder / name).chmod(0o755)

    write()
    return write


@pytest.fixture
def plan(tmp_path: Path) -> Callable[..., Plan]:
    def written(text: str = RUN) -> Plan:
        (tmp_path / "run.yaml").write_text(text)
        found = Plan(load_study(tmp_path / "run.yaml"), tmp_path / "results")
        found.write()
        return found

    return written


def calls(tmp_path: Path, name: str) -> int:
    path = tmp_path / "bin" / f"{name}.calls"
    return len(path.read_text().splitlines()) if path.exists() else 0


# --- arithmetic --------------------------------------------------------------------------------


def test_hours_are_billed_and_divided_by_time():
    quarter = attempt(line(tres="billing=8,cpu=8,node=1", start=0, end=3600))
    assert spent_node_hours(quarter, full_billing=32) == 0.25
    assert spent_node_hours(quarter, full_billing=32, begin=2700) == 0.0625
    assert spent_node_hours(quarter, full_billing=32, end=0) == 0
    running = attempt(line(state="RUNNING", start=0, end="Unknown", elapsed=1800))
    assert spent_node_hours(running, full_billing=32) == 0.5
    assert spent_node_hours(attempt(waiting()), full_billing=32) == 0


def test_what_is_in_the_queue_is_committed_to_its_time_limit():
    running = attempt(line(state="RUNNING", end="Unknown", elapsed=1800, limit=60))
    assert committed_node_hours(running, SITE) == 0.5
    assert committed_node_hours(attempt(waiting(limit=120)), SITE) == 2
    assert committed_node_hours(attempt(waiting(limit="Partition_Limit")), SITE) == 24
    assert committed_node_hours(attempt(waiting(limit=60, shown_id="7_[0-9:3,20%2]")), SITE) == 5
    small = attempt(waiting(limit=60, requested="billing=1,cpu=1,node=1"))
    assert committed_node_hours(small, SITE) == 1 / 32
    assert committed_node_hours(small, SITE, whole_nodes=2) == 2
    assert committed_node_hours(attempt(line()), SITE) == 0
    # A requeued attempt is over; the one that follows has a record of its own.
    assert committed_node_hours(attempt(line(state="REQUEUED")), SITE) == 0


def test_a_job_may_spend_its_nodes_for_its_time_limit():
    assert job_node_hours(LaunchConfig(nodes=3, minutes=90), SITE) == 4.5
    assert job_node_hours(LaunchConfig(nodes=1, minutes=9999), SITE) == 24


def test_outside_the_allocations_days_nothing_is_submitted():
    check_dates(SITE, today=SITE.allocation.end if SITE.allocation else None)
    with pytest.raises(BudgetError, match=f"ended on {ALLOCATION['end']}"):
        check_dates(SITE, today=ALLOCATION["end"] + timedelta(1))
    with pytest.raises(BudgetError, match="begins only on"):
        check_dates(SITE, today=date(2000, 1, 1))


# --- caps --------------------------------------------------------------------------------------


def test_a_cap_enters_no_key_and_is_one_for_the_study(
    plan: Callable[..., Plan], tmp_path: Path, records: object
):
    before = {i.place for i in plan().instances.values()}
    capped = plan(RUN + "budget: {cap_node_hours: 5}\n")
    assert {i.place for i in capped.instances.values()} == before
    document = json.loads(capped.path.read_text())
    assert document["cap_node_hours"] == 5
    assert "budget" not in document["cells"][0]["config"]
    (tmp_path / "grid.yaml").write_text(
        "study: g\nbase: run.yaml\naxes: {budget.cap_node_hours: [1.0, 2.0]}\n"
    )
    with pytest.raises(ConfigError, match="one figure for the whole study"):
        Plan(load_study(tmp_path / "grid.yaml"), tmp_path / "results").write()


def test_where_nothing_binds_nobody_is_asked(
    plan: Callable[..., Plan], tmp_path: Path, records: Callable[..., None]
):
    place = plan().cells[0].train.place
    free = SITE.model_copy(update={"allocation": None})
    with allow(1e9, place=place, job_name="x", results=tmp_path / "results", site=free) as note:
        note("1")
    assert calls(tmp_path, "sacct") == 0


def test_the_allocation_counts_colleagues_queue_and_reservations(
    plan: Callable[..., Plan], tmp_path: Path, records: Callable[..., None]
):
    cells = plan()
    train, base = cells.cells[0].train.place, cells.cells[0].base.place
    results = tmp_path / "results"
    spent = line(elapsed=3600 * 20, start=NOW - 3600 * 21, user="colleague")
    queued = waiting(job_id="8")
    records(spent, queued)
    with allow(50, place=base, job_name="b", results=results, site=SITE):
        with (
            pytest.raises(BudgetError) as caught,
            allow(6.5, place=train, job_name="t", results=results, site=SITE),
        ):
            pass
        text = str(caught.value)
        assert "job t does not fit the allocation of euhpc_test, colleagues' jobs included" in text
        assert "20.00 spent + 24.00 committed" in text
        assert "50.00 reserved" in text
        assert "6.50 of this job = 100.50 of 100.00 node-hours, 0.50 too many" in text
        with allow(6, place=train, job_name="t", results=results, site=SITE) as note:
            note("77")
    # Once on record a job is reserved for no longer, by its id or, without one, by its name.
    found = open_reservations(results, [attempt(line(job_id="77"))], SITE)
    assert found.keys() == {base}
    named = [attempt(line(job_id="77")), attempt(line(job_id="78", name="b", submit=NOW + 5))]
    assert open_reservations(results, named, SITE) == {}


def test_a_refused_submission_leaves_nothing_reserved(
    plan: Callable[..., Plan], tmp_path: Path, records: Callable[..., None]
):
    place, results = plan().cells[0].train.place, tmp_path / "results"
    with (
        pytest.raises(ClusterError, match="Invalid qos"),
        allow(1, place=place, job_name="t", results=results, site=SITE),
    ):
        raise ClusterError("Invalid qos")
    assert open_reservations(results, [], SITE) == {}


def test_a_studys_cap_binds_its_own_jobs(
    plan: Callable[..., Plan], tmp_path: Path, records: Callable[..., None]
):
    cells = plan(RUN + "budget: {cap_node_hours: 5}\n")
    place, results = cells.cells[0].train.place, tmp_path / "results"
    comment = "abf " + place.replace("/", " ", 1)
    records(
        line(comment=comment, state="NODE_FAIL"),
        line(comment=comment, submit=NOW - 3600, elapsed=7200, workdir="/elsewhere"),
        line(job_id="9", user="colleague", elapsed=36_000),
    )
    free = SITE.model_copy(update={"allocation": None})
    for site in (SITE, free):
        with allow(4, place=place, job_name="t", results=results, site=site):
            pass
        with (
            pytest.raises(BudgetError, match=r"cap of study small: 1\.00 spent \+ 4\.50 of this"),
            allow(4.5, place=place, job_name="t", results=results, site=site),
        ):
            pass


ASK = """
import sys, time
from pathlib import Path
from abf.errors import BudgetError
from abf.ledger.reserve import allow
from tests.ledger.test_budget import SITE
site = SITE.model_copy(update={"poll_seconds": 600.0})
try:
    with allow(24.0, place=sys.argv[1], job_name=sys.argv[1], results=Path("results"), site=site):
        pass
    print("yes")
except BudgetError:
    print("no")
"""


def test_of_many_who_ask_at_once_only_as_many_as_fit_are_let(
    tmp_path: Path, records: Callable[..., None]
):
    places = [f"train/t{i}" for i in range(7)]
    (tmp_path / "results/plan").mkdir(parents=True)
    document = {"study": "s", "grid": "g.yaml", "stages": places, "cells": []}
    (tmp_path / "results/plan/s.json").write_text(json.dumps(document))
    root = Path(__file__).parents[2]
    asking = [
        subprocess.Popen(
            [sys.executable, "-c", ASK, place],
            stdout=subprocess.PIPE, text=True, cwd=tmp_path,
            env={"PATH": f"{tmp_path}/bin:/usr/bin:/bin", "PYTHONPATH": str(root)},
        )
        for place in places
    ]  # fmt: skip
    answers = [process.communicate(timeout=120)[0].strip() for process in asking]
    assert sorted(answers) == ["no"] * 3 + ["yes"] * 4
    assert calls(tmp_path, "sacct") == 1, "one look for all of them"


def test_an_accounting_that_is_away_is_waited_for(
    plan: Callable[..., Plan], tmp_path: Path, records: Callable[..., None]
):
    place, results = plan().cells[0].train.place, tmp_path / "results"
    sacct = tmp_path / "bin/sacct"
    real = sacct.read_text()
    sacct.write_text(f"#!/bin/sh\necho '{real}' > {sacct}; echo away >&2; exit 1\n")
    with allow(1, place=place, job_name="t", results=results, site=SITE) as note:
        note("1")
    sacct.write_text("#!/bin/sh\necho away >&2; exit 1\n")
    site = SITE.model_copy(update={"unknown_seconds": 0.05})
    time.sleep(0.02)
    with (
        pytest.raises(ClusterError, match="away"),
        allow(1, place=place, job_name="t", results=results, site=site),
    ):
        pass


# --- the page ----------------------------------------------------------------------------------


def finish(directory: Path, **counts: int) -> None:
    from abf.stages import STAGES

    (directory / ".done").mkdir(parents=True)
    version = STAGES[directory.parent.name].version
    document = {"stage_version": version, "counts": counts}
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
