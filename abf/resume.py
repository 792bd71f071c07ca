"""A new driver on a cluster takes over from a dead one before Snakemake looks at any file.

The dead driver's jobs are waited for, and what they finished is declared and no longer marked as
incomplete: else Snakemake would submit a job for each, only to learn that there is nothing to do.
"""

from __future__ import annotations

import sys
from base64 import urlsafe_b64decode
from collections.abc import Iterator
from pathlib import Path

from abf.budget import check_plan
from abf.cluster import checks
from abf.cluster.config import SiteConfig
from abf.cluster.limits import store_limits
from abf.driver import claim, settle
from abf.errors import ArtifactError
from abf.instance import trainings
from abf.job import Job
from abf.plan import Plan
from abf.stage import declare
from abf.stages import MANIFEST

INCOMPLETE = Path(".snakemake", "incomplete")
"""Snakemake's marks of outputs whose jobs it did not see ending: a file each, named after it."""


def take_over(plan: Plan, site: SiteConfig) -> None:
    """Claim the results folder, wait for a dead driver's jobs, declare what they finished.

    The site's limits are stored with the run (they move). What they would refuse, and a plan that
    does not fit the budget, is refused before anything is submitted.

    Raises:
        ConfigError: account, partition, QOS or size of the jobs are not what the scheduler takes.
        LockError: another driver is at work.
        ClusterError: the scheduler does not answer.
        BudgetError: the plan does not fit; says by how much, and what to change.
    """
    claim(plan.results, str(plan.study.path))
    limits, computing = store_limits(site, plan.results), checks.lanes(site)[:1]
    checks.refuse(checks.entry(site, limits, trainings(plan.instances.values()), computing))
    settle(plan.results, [i.place for i in plan.instances.values()], interval=site.poll_seconds)
    _declare_finished(plan)
    print(check_plan(plan, site), file=sys.stderr, flush=True)


def _declare_finished(plan: Plan) -> None:
    places = {f"{plan.results}/{i.place}/{MANIFEST}": i for i in plan.instances.values()}
    for mark, output in _incomplete():
        instance = places.get(output)
        if instance is None:
            continue
        job = Job.open(instance.stage, Path(output))
        try:
            finished = job.finished()
        except ArtifactError:  # an input is not whole: Snakemake makes both again
            continue
        if finished:
            declare(job.directory)
            mark.unlink()


def _incomplete() -> Iterator[tuple[Path, str]]:
    """Mark and output; Snakemake writes the output's name in base 64, cut into folders `@...`."""
    for mark in sorted(INCOMPLETE.rglob("*")):
        if mark.is_file():
            parts = mark.relative_to(INCOMPLETE).parts
            name = "".join(part.removeprefix("@") for part in parts)
            try:
                yield mark, urlsafe_b64decode(name).decode()
            except ValueError:
                continue  # not a mark
