"""What the scheduler is told of the job of a stage directory, and what is kept of its answer.

A place is `{stage}/{key}`. Names of our jobs begin with the tag of their results folder, so that
two of them in one checkout never mix. Jobs of Snakemake's Slurm executor say rule and wildcards in
their comment, jobs of `abf.launch` stage and key: by tag and comment a job is recognised later.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from abf.errors import ArtifactError
from abf.files import write_json

RECORD = "job.json"
"""File in a stage directory: id, name and end of its last submitted job."""
OVER_BUDGET = "over_budget"
"""Key in it: why a cap or the allocation let no job be submitted after that one."""


def tag(results: Path) -> str:
    """What the names of a results folder's jobs begin with, however and from where it is named."""
    return f"abf-{hashlib.sha256(os.path.realpath(results).encode()).hexdigest()[:10]}"


def launch_comment(place: str) -> str:
    """Comment of a job that `abf.launch` submits."""
    return f"abf {place.replace('/', ' ', 1)}"


def rule_comment(place: str) -> str:
    """Comment of a job that Snakemake's Slurm executor submits."""
    stage, _, key = place.partition("/")
    return f"rule_{stage}_wildcards_{key.replace('/', '_')}"


def by_comment(places: Iterable[str]) -> dict[str, str]:
    """Comment -> place, for both kinds of jobs."""
    return {say(place): place for place in places for say in (launch_comment, rule_comment)}


def job_record(directory: Path) -> dict[str, Any]:
    """Record of a directory's last submitted job; empty where none was submitted.

    Raises:
        ArtifactError: it is damaged; to go on as if there were none could run the job twice.
    """
    path = directory / RECORD
    try:
        record = json.loads(path.read_bytes())
        if isinstance(record, dict):
            return record
    except FileNotFoundError:
        return {}
    except ValueError:
        pass
    raise ArtifactError(
        f"{path} is damaged: see with `squeue --me` whether the job of this directory lives, wait "
        "for it or cancel it, then delete the file"
    )


def by_id(results: Path, places: Iterable[str]) -> dict[str, str]:
    """Id of the last submitted job -> place, of those places that have one."""
    ids = {place: job_record(results / place).get("job_id") for place in places}
    return {job_id: place for place, job_id in ids.items() if job_id}


class Job(Protocol):
    """What tells a job from others, in the queue as in the records."""

    @property
    def job_id(self) -> str: ...
    @property
    def name(self) -> str: ...
    @property
    def comment(self) -> str: ...


class Known:
    """The jobs of a results folder."""

    def __init__(self, results: Path, ids: Mapping[str, str] | None = None) -> None:
        """
        Args:
            ids: of jobs that we know of otherwise, with their places.
        """
        self._tag, self._ids = tag(results), ids or {}

    def __contains__(self, job: Job) -> bool:
        if job.name.startswith(self._tag):
            return True
        place = self._ids.get(job.job_id)
        # A database that was away when a controller restarted knows a job by its id alone; when
        # results were moved the tag is another. But ids are used again: a comment must fit.
        return place is not None and (not job.comment or job.comment in by_comment([place]))


def write_job_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Replace the record, atomically."""
    write_json(directory / RECORD, record)
