"""What the scheduler is told of the job of a stage directory, and what is kept of its answer.

A place is `{stage}/{key}`. Jobs of Snakemake's Slurm executor say rule and wildcards in their
comment, jobs of `abf.launch` stage and key; by that, and by its folder, a job is recognised later.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from abf.files import write_json

RECORD = "job.json"
"""File in a stage directory: id, name and end of its last submitted job."""
RULE_PREFIX = "abf_"
"""Of the names of jobs that Snakemake's Slurm executor submits (profiles/leonardo)."""


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


def is_ours(comment: str) -> bool:
    """Whether a comment is one of ours, whatever the place."""
    return comment.startswith(("abf ", "rule_"))


def job_record(directory: Path) -> dict[str, Any]:
    """Record of a directory's last submitted job; empty where none was submitted."""
    path = directory / RECORD
    return json.loads(path.read_bytes()) if path.exists() else {}


def by_id(results: Path, places: Iterable[str]) -> dict[str, str]:
    """Id of the last submitted job -> place, of those places that have one."""
    ids = {place: job_record(results / place).get("job_id") for place in places}
    return {job_id: place for place, job_id in ids.items() if job_id}


def write_job_record(directory: Path, record: Mapping[str, Any]) -> None:
    """Replace the record, atomically."""
    write_json(directory / RECORD, record)
