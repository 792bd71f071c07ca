"""The arithmetic of node-hours, caps and reservations, with stand-ins for the scheduler."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date, timedelta
from pathlib import Path

import pytest

from abf.cluster.config import LaunchConfig
from abf.cluster.history import Attempt, parse
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
from tests.ledger.accounting import ALLOCATION, NOW, RUN, SITE, line, waiting


def attempt(text: str) -> Attempt:
    (found,) = parse(text)
    return found


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
    later = int(time.time()) + 5
    named = [attempt(line(job_id="77")), attempt(line(job_id="78", name="b", submit=later))]
    assert open_reservations(results, named, SITE) == {}


@pytest.mark.parametrize("state", ["RUNNING", "COMPLETED", None])
def test_a_job_that_the_database_does_not_know_yet_stays_reserved_while_it_lives(
    plan: Callable[..., Plan], tmp_path: Path, records: Callable[..., None], state: str | None
):
    place, results = plan().cells[0].train.place, tmp_path / "results"
    fields = ["77", state, "None", "n", "c", "boost_usr_prod", "1:00"]
    records(queue=SEPARATOR.join(fields) + "\n" if state else "")
    with allow(1, place=place, job_name="t", results=results, site=SITE) as note:
        note("77")
    late = SITE.model_copy(update={"unknown_seconds": -1.0})  # too old, however young
    assert bool(open_reservations(results, [], late)) == (state == "RUNNING")


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
        line(comment=comment, submit=NOW - 3600, elapsed=7200, name="abf-else"),
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


def test_a_cap_counts_a_running_job_whose_comment_the_database_does_not_know_yet(
    plan: Callable[..., Plan], tmp_path: Path, records: Callable[..., None]
):
    """Slurm hands a job's comment to its database when the job ends."""
    cells = plan(RUN + "budget: {cap_node_hours: 5}\n")
    place, results = cells.cells[0].train.place, tmp_path / "results"
    said = "abf " + place.replace("/", " ", 1)
    fields = ["7", "RUNNING", "None", "n", said, "boost_usr_prod", "1:00"]
    running = line(comment="", state="RUNNING", end="Unknown", limit=240)
    free = SITE.model_copy(update={"allocation": None})
    for site in (SITE, free):
        records(running, queue=SEPARATOR.join(fields) + "\n")
        with (
            pytest.raises(BudgetError, match=r"1\.00 spent \+ 3\.00 committed"),
            allow(1.5, place=place, job_name="t", results=results, site=site),
        ):
            pass


ASK = """
import sys, time
from pathlib import Path
from abf.errors import BudgetError
from abf.ledger.reserve import allow
from tests.ledger.accounting import SITE
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
