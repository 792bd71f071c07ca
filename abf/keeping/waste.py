"""What may be deleted of a results folder and of its kept copies, and deleting it.

Policy. At once: `ckpt/` of a training that is finished and whole, and what dead attempts, copies
and deletions left half-done. After `storage.keep_days` without a writing: a directory that no plan
names, here and among the kept copies. Never: anything of a place that is at work or, unfinished, in
a plan; and never the records of attempts and jobs, from which the ledger is built.

Nothing is deleted under its own name: marks of finished work go first, then everything moves to
`.gc/`, which is emptied last. A deletion that was killed goes on with the next one. Sizes in bytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from abf.artifacts import PlanDocument, damage, read_plans
from abf.cluster import slurm
from abf.cluster.disks import survey
from abf.cluster.jobs import RECORD, by_comment, by_id, job_record, write_job_record
from abf.errors import LockError
from abf.files import lock, read_if_json, write_json
from abf.keeping.restore import STAGING as RESTORING
from abf.keeping.store import LIST, Store, declared, unfinished_copies
from abf.stage import DONE, STAGING
from abf.stages import CONFIG, ENDS, MANIFEST, STAGES
from abf.track.attempts import ATTEMPTS, HEARTBEAT
from abf.track.outcomes import attempt_outcomes

BIN = ".gc"
"""Folder in a results folder: what is being deleted."""
CHECKPOINTS = "ckpt"
DELETED = "DELETED"
"""Entry in `job.json`: what this job made was deleted."""
LEFT = (STAGING, RESTORING)
RECORDS = (ATTEMPTS, RECORD, HEARTBEAT)
"""What a directory keeps for ever: its attempts, its last job, and the length of a killed one."""
STAY = frozenset({*RECORDS, CONFIG, ".lock"})


@dataclass(frozen=True)
class Waste:
    """Something that may go."""

    root: Path
    """Results folder, or folder of kept copies."""
    path: Path
    why: str
    size: int
    files: int
    whole: bool = False
    """A stage directory, which keeps its records."""


def plan_places(plan: PlanDocument) -> list[str]:
    """Every directory that a plan names."""
    return [*plan["stages"], *(f"{stage}/{plan['study']}" for stage in ENDS)]


def planned_places(results: Path, store: Store | None) -> set[str]:
    """Every directory that a plan names, be the plan here or among the kept copies."""
    plans = [*read_plans(results), *(read_plans(store.root) if store else ())]
    return {place for plan in plans for place in plan_places(plan)}


def stage_places(root: Path) -> list[str]:
    """Stage directories below a folder, planned or not."""
    found = []
    for stage in STAGES:
        # Only these have two parts in their keys: what they read, and their own.
        for path in sorted((root / stage).glob(f"{'*/*' if stage == 'decode' else '*'}/{CONFIG}")):
            directory = path.parent
            if (read_if_json(path) or {}).get("stage") == stage and directory.name[0] != ".":
                found.append(directory.relative_to(root).as_posix())
    return found


def at_work(results: Path, places: Sequence[str]) -> set[str]:
    """Places with a job in the queue or a living attempt.

    Raises:
        ClusterError: there is a scheduler, and it does not answer.
    """
    living = set()
    for place in places:
        outcomes = attempt_outcomes(results / place)
        if outcomes and outcomes[-1]["state"] == "RUNNING":
            living.add(place)
    queue = [job for job in slurm.queue() if job.live] if slurm.available() else []
    if queue:
        # Of whichever folder: what only looks like another's job is left alone as well.
        said, submitted = by_comment(places), by_id(results, places)
        known = ((submitted.get(job.job_id), said.get(job.comment)) for job in queue)
        living |= {place for pair in known for place in pair if place}
    return living


def find(
    results: Path,
    store: Store | None,
    *,
    planned: Collection[str],
    keep_days: int,
    only: Collection[str] | None = None,
) -> Iterator[Waste]:
    """Everything that the policy lets go.

    Args:
        planned: places that some plan names.
        only: look at these places alone; None: at all there are.

    Raises:
        ClusterError: there is a scheduler, and it does not answer.
    """
    places = [place for place in stage_places(results) if only is None or place in only]
    living = at_work(results, places)
    for place in places:
        if place in living:
            continue
        if place not in planned and (gone := _unplanned(results, place, keep_days)):
            yield gone
        else:
            yield from _parts(results, place)
    yield from _bin(results)
    if store is None:
        return
    for place in stage_places(store.root):
        if place not in planned and (only is None or place in only):
            gone = _unplanned(store.root, place, keep_days)
            if gone:
                yield gone
    for path in unfinished_copies(store.root) if only is None else ():
        yield _entry(store.root, path, "left of a copy that was killed")
    yield from _bin(store.root)


def _unplanned(root: Path, place: str, keep_days: int) -> Waste | None:
    tree = survey(root / place, skip=STAY)
    records = any((root / place / name).exists() for name in RECORDS)
    if not tree.files and records:
        return None  # nothing left but records
    days = tree.written_days if tree.files else survey(root / place).written_days
    if days <= keep_days:
        return None
    why = f"no plan names it, last written {days:.0f} days ago (storage.keep_days: {keep_days})"
    return Waste(root, root / place, why, tree.size, tree.files, whole=True)


def _parts(results: Path, place: str) -> Iterator[Waste]:
    directory = results / place
    for name in LEFT:
        if (directory / name).exists():
            yield _entry(results, directory / name, "left of an attempt that died")
    checkpoints = directory / CHECKPOINTS
    if checkpoints.exists():
        manifest = declared(directory, place)
        if manifest is not None and damage(directory, manifest) is None:
            yield _entry(results, checkpoints, "checkpoints of a finished training")


def _bin(root: Path) -> Iterator[Waste]:
    if any(path.name != ".lock" for path in (root / BIN).glob("*")):
        yield _entry(root, root / BIN, "left of a deletion that was killed")


def _entry(root: Path, path: Path, why: str) -> Waste:
    tree = survey(path)
    return Waste(root, path, why, tree.size, tree.files)


# --- deleting ----------------------------------------------------------------------------------


def remove(waste: Iterable[Waste], results: Path) -> Iterator[tuple[Waste, str]]:
    """Delete one after the other; yields each with why it was left, empty when it is gone.

    The caller holds the store, if there is one, and the bin of the results.
    """
    for one in waste:
        directory = one.path if one.whole else one.path.parent
        own = one.root == results and one.path.name != BIN  # the store guards its copies
        try:
            with lock(directory, "abf gc") if own else contextlib.nullcontext():
                _discard(one)
        except LockError as error:
            yield one, str(error)
            continue
        for path in (one.root / BIN).glob("*"):
            if path.is_dir():
                shutil.rmtree(path)
        yield one, ""


def _discard(one: Waste) -> None:
    """Move it to the bin; a moment, so that no job that begins now finds its place taken."""
    if one.path.name == BIN:
        return
    folder = one.root / BIN / f"{time.time_ns()}-{one.path.name}"
    folder.mkdir(parents=True)
    if not one.whole:
        os.rename(one.path, folder / one.path.name)
        return
    for mark in (MANIFEST, f"{DONE}/{MANIFEST}"):
        (one.path / mark).unlink(missing_ok=True)
    for path in [path for path in one.path.iterdir() if path.name not in STAY]:
        os.rename(path, folder / path.name)
    if not any((one.path / name).exists() for name in RECORDS):  # never attempted
        os.rename(one.path, folder / "rest")
    elif "ended" not in (record := job_record(one.path)) and record:
        # Should it be planned again, nobody is to wait for the job that made what is gone.
        write_job_record(one.path, record | {"ended": DELETED})
    listed = read_if_json(one.root / LIST)
    place = one.path.relative_to(one.root).as_posix()
    if listed is not None and listed.pop(place, None):
        write_json(one.root / LIST, listed)
