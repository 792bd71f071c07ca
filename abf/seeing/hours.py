"""What a study cost so far and will cost yet: core-hours, and node-hours of the scheduler's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from abf.cluster import slurm
from abf.cluster.history import history
from abf.errors import ClusterError
from abf.ledger.build import ledger_rows
from abf.ledger.slurm import changed_since, kept_records, ours, slurm_rows
from abf.seeing.at_work import job_record
from abf.seeing.planned import Planned
from abf.site import load_node
from abf.stages import STAGES


@dataclass(frozen=True)
class Hours:
    """A cost: work without a scheduler in core-hours, the scheduler's in node-hours."""

    core: float = 0.0
    node: float = 0.0

    def __add__(self, other: Hours) -> Hours:
        return Hours(self.core + other.core, self.node + other.node)

    def less(self, other: Hours) -> Hours:
        """What is left of it, at least nothing."""
        return Hours(max(0.0, self.core - other.core), max(0.0, self.node - other.node))

    def __mul__(self, factor: float) -> Hours:
        return Hours(self.core * factor, self.node * factor)


def hours_spent(planned: Planned, trouble: list[str]) -> tuple[dict[str, Hours], int]:
    """Hours of every attempt so far by place, as the ledger counts them; number of attempts.

    The scheduler is asked for what the kept records lack; unlike the ledger, this keeps nothing.
    """
    results, places = planned.results, planned.places
    own = [
        row for place in places for row in ledger_rows(results / place, run=place.partition("/")[2])
    ]
    records = kept_records(results)
    was_scheduled = records or any(row["job_id"].isdigit() for row in own)
    if slurm.available() and (was_scheduled or any(map(job_record, planned.directories))):
        try:
            for attempt in ours(history(since=changed_since(records.values()))):
                records[attempt.key] = attempt
        except ClusterError as error:
            trouble.append(f"node-hours are as of the last ledger: {str(error).splitlines()[0]}")
    billing = load_node().billing
    scheduled = slurm_rows(list(records.values()), places, results, full_billing=billing)
    jobs = {row["job_id"] for row in scheduled}
    rows = [*(row for row in own if row["job_id"] not in jobs), *scheduled]
    spent: dict[str, Hours] = {}
    for row in rows:
        place = f"{row['rule']}/{row['run']}"
        hours = Hours(row["core_hours"] or 0.0, row["node_hours"] or 0.0)
        spent[place] = spent.get(place, Hours()) + hours
    return spent, len(rows)


def hours_to_come(
    states: Mapping[str, str], spent: Mapping[str, Hours]
) -> tuple[dict[str, Hours], list[str]]:
    """Hours to come by stage: what a finished directory of the stage cost, failures included."""
    to_come: dict[str, Hours] = {}
    unmeasured = []
    for stage in STAGES:
        here = {p: s for p, s in states.items() if p.partition("/")[0] == stage}
        todo = [p for p, s in here.items() if s != "done"]
        made = [spent[p] for p, s in here.items() if s == "done" and p in spent]
        if not todo:
            continue
        if not made:
            unmeasured.append(stage)
            continue
        mean = sum(made, Hours()) * (1 / len(made))
        running = [p for p in todo if here[p] == "running"]
        left = [mean.less(spent.get(p, Hours())) for p in running]
        to_come[stage] = sum(left, mean * (len(todo) - len(running)))
    return to_come, unmeasured
