"""What a study cost so far and will cost yet: core-hours, and node-hours of the scheduler's."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

from abf.cluster.jobs import launch_comment
from abf.ledger.budget import Used
from abf.ledger.forecast import forecast
from abf.ledger.slurm import rows_so_far
from abf.ledger.work import work_done, work_left
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


def hours_spent(planned: Planned, trouble: list[str]) -> tuple[dict[str, Hours], int]:
    """Hours of every attempt so far by place, as the ledger counts them; number of attempts."""
    rows = rows_so_far(planned.results, planned.places, node=load_node(), trouble=trouble)
    spent: dict[str, Hours] = {}
    for row in rows:
        place = f"{row['rule']}/{row['run']}"
        hours = Hours(row["core_hours"] or 0.0, row["node_hours"] or 0.0)
        spent[place] = spent.get(place, Hours()) + hours
    return spent, len(rows)


def hours_to_come(
    planned: Planned, states: Mapping[str, str], spent: Mapping[str, Hours]
) -> tuple[dict[str, Hours], list[str]]:
    """Hours to come by stage, and the stages of which something is to do that nothing measured.

    Core-hours are those of the mean finished directory of the stage, failures included, less what
    one that runs has spent; node-hours are the medians of the forecast (`abf.ledger.forecast`).
    """
    todo = [place for place, state in states.items() if state != "done"]
    billed = {launch_comment(place): (h.node, 0.0) for place, h in spent.items() if h.node}
    used = Used(at=time.time(), who="own jobs", by_comment=billed)
    coming = forecast(work_left(todo, used, planned.results), work_done(used, planned.results))
    to_come: dict[str, Hours] = {}
    for kind in coming.kinds:
        stage = kind.kind.partition(" ")[0]
        to_come[stage] = to_come.get(stage, Hours()) + Hours(node=kind.median_node_hours)
    beyond = {piece.place for piece in coming.unmeasured}
    unmeasured = []
    for stage in STAGES:
        here = {p: s for p, s in states.items() if p.partition("/")[0] == stage}
        left = [p for p, s in here.items() if s != "done"]
        made = [spent[p].core for p, s in here.items() if s == "done" and p in spent]
        if left and sum(made):
            mean = sum(made) / len(made)
            cores = (
                max(0.0, mean - spent.get(p, Hours()).core) if here[p] == "running" else mean
                for p in left
            )
            to_come[stage] = to_come.get(stage, Hours()) + Hours(core=sum(cores))
        elif left and (stage not in to_come or beyond.intersection(left)):
            unmeasured.append(stage)
    return {stage: to_come[stage] for stage in STAGES if stage in to_come}, unmeasured
