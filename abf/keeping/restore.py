"""What a purge took of planned directories: restored from their kept copies, or named as lost.

A directory is missing when it was finished once and its manifest, or a file that the manifest
lists, is not there. It comes back whole, with the times its files had, so that Snakemake finds
nothing newer than what was made from it. What cannot come back loses its manifest, and is made
again when something needs it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abf.artifacts import damage, publish
from abf.cluster.disks import LEAST_FREE, free_bytes, spoken
from abf.cluster.jobs import job_record, write_job_record
from abf.errors import ArtifactError, LockError
from abf.files import lock, read_if_json
from abf.keeping.copies import (
    Unfaithful,
    copy_beside,
    copy_file,
    copy_payload,
    megabytes,
    seal,
)
from abf.keeping.store import Store
from abf.ledger.slurm import kept_records, merge_records, store_records
from abf.stage import DONE
from abf.stages import CONFIG, MANIFEST, STAGES
from abf.track.attempts import read_attempts

STAGING = ".restoring"
UNMADE = "it is not there"
LOST = "LOST"
"""Entry in `job.json`: what this job made is gone, so nobody is to wait for it."""


@dataclass(frozen=True)
class Missing:
    """A directory that was finished once and is not whole."""

    place: str
    fault: str
    """What is not there."""
    size: int | None
    """Bytes of the copy that it can be restored from; none: it is lost."""
    why: str = ""
    """Why it cannot be restored."""


def missing(places: Sequence[str], results: Path, store: Store | None) -> list[Missing]:
    """Planned directories that were finished and are not whole, in the order given."""
    found = {
        place: _fault(results / place) or _undeclared(place, results, store) for place in places
    }
    kept = {place: _copy_of(place, store) for place, fault in found.items() if fault is not None}
    listed = store.listed() if store else {}
    whole = [place for place, fault in found.items() if fault is None]
    used = _inputs(results, whole) if len(whole) < len(found) else {}
    if store is not None:
        used = _inputs(store.root, [p for p, (size, _) in kept.items() if size is not None]) | used
    answers = []
    for place, fault in found.items():
        if fault is None:
            continue
        size, why = kept[place]
        if size is None and fault == UNMADE:
            if place in used:
                fault = f"it is not there, and {used[place]} was made from it"
            elif place in listed or _was_completed(results / place):
                fault = "it is not there, and was finished once"
            else:
                continue  # never made
        if size is not None and _fault(results / place) is None:
            size = 0  # all there but its name
        answers.append(Missing(place, fault, size, why))
    return answers


def _fault(directory: Path) -> str | None:
    """None: whole; UNMADE: no trace of a manifest; else what is wrong."""
    for path in (directory / MANIFEST, directory / DONE / MANIFEST):
        if path.exists():
            manifest = read_if_json(path)
            return f"{path} is not JSON" if manifest is None else damage(directory, manifest)
    return UNMADE


def _undeclared(place: str, results: Path, store: Store | None) -> str | None:
    """A restoring that was killed just before its end, or a rule that Snakemake began anew."""
    directory, done = results / place, results / place / DONE / MANIFEST
    if store is None or (directory / MANIFEST).exists() or not done.exists():
        return None
    copy = store.root / place / MANIFEST
    same = copy.exists() and copy.read_bytes() == done.read_bytes()
    return f"it has no {MANIFEST}" if same else None


def _copy_of(place: str, store: Store | None) -> tuple[int | None, str]:
    """Bytes of a usable kept copy, or why there is none."""
    if store is None:
        return None, "nothing is kept: storage.work of the site file is not set"
    manifest = store.manifest(place)
    if manifest is None:
        return None, f"{store.root} has no copy"
    version, now = manifest["stage_version"], STAGES[place.partition("/")[0]].version
    if version != now:
        return None, f"the copy in {store.root} is of stage version {version}, now it is {now}"
    if wrong := damage(store.root / place, manifest):
        return None, f"its copy is not whole: {wrong}"
    return sum(entry["bytes"] for entry in manifest["files"].values()), ""


def _inputs(root: Path, places: Iterable[str]) -> dict[str, str]:
    """Input place -> a place that was made from it."""
    found: dict[str, str] = {}
    for place in places:
        inputs: Mapping[str, Any] = (read_if_json(root / place / CONFIG) or {}).get("inputs", {})
        for names in inputs.values():
            for name in [names] if isinstance(names, str) else names:
                found.setdefault(name, place)
    return found


def _was_completed(directory: Path) -> bool:
    attempts = read_attempts(directory)
    return bool(attempts) and attempts[-1]["state"] == "COMPLETED"


def restore(
    gone: Iterable[Missing], results: Path, store: Store | None, *, say: Callable[[str], None]
) -> list[Missing]:
    """Bring back what can be brought back; the caller holds the store.

    Args:
        say: told one line for each directory, restored or lost.

    Returns:
        what is lost.

    Raises:
        ArtifactError: there is no room for it, by numbers, before anything is copied.
    """
    gone = list(gone)
    total = sum(one.size for one in gone if one.size is not None)
    if total and total + LEAST_FREE > (free := free_bytes(results)):
        raise ArtifactError(
            f"{spoken(total)} of finished directories must be restored to {results}, where "
            f"{spoken(free)} are free and {spoken(LEAST_FREE)} must stay so: free space there, and "
            "run the same command again"
        )
    lost = []
    with megabytes("restore", total) as count:
        for one in gone:
            try:
                if one.size is not None and store is not None:
                    with lock(results / one.place, "abf keep --restore"):
                        _bring_back(one.place, results, store, count)
                    where = store.root / one.place
                    say(f"restored {one.place} ({spoken(one.size)}) from {where}: {one.fault}")
                    continue
            except LockError as error:
                say(f"not restored: {error}")
                continue
            except Unfaithful as error:  # a copy that went bad
                one = Missing(one.place, one.fault, None, str(error))
            lost.append(one)
            _forget(results / one.place)
            say(
                f"lost: {one.place}: {one.fault}; {one.why}. It is made again if something needs it"
            )
    return lost


def _bring_back(place: str, results: Path, store: Store, count: Callable[[int, str], None]) -> None:
    """Payload first, marks of finished work last: no half directory counts as finished."""
    directory, copy = results / place, store.root / place
    manifest = store.manifest(place)
    assert manifest is not None, place
    staging = directory / STAGING
    if damage(directory, manifest) is not None:
        copy_payload(copy, staging, manifest, each=lambda size: count(size, place))
        for mark in (directory / MANIFEST, directory / DONE / MANIFEST):
            mark.unlink(missing_ok=True)
        publish(staging, directory, STAGES[place.partition("/")[0]].payload)
    shutil.rmtree(staging, ignore_errors=True)
    copy_beside(copy, directory, older=True)
    seal(copy, directory)


def _forget(directory: Path) -> None:
    """Take the marks of finished work off what is no longer whole."""
    if not any(
        (directory / mark).exists() for mark in (MANIFEST, f"{DONE}/{MANIFEST}", "job.json")
    ):
        return
    try:
        with lock(directory, "abf keep --restore"):
            if _fault(directory) is not None:
                (directory / MANIFEST).unlink(missing_ok=True)
                (directory / DONE / MANIFEST).unlink(missing_ok=True)
            record, attempts = job_record(directory), read_attempts(directory)
            made = [a for a in attempts if a["state"] == "COMPLETED"]
            # A job that was submitted since has another id, and is left alone.
            if made and record.get("job_id") == made[-1]["job_id"] and "ended" not in record:
                write_job_record(directory, record | {"ended": LOST})
    except LockError:
        return  # somebody makes it again


def uncover(lost: frozenset[str], made_from: Mapping[str, Sequence[str]], results: Path) -> None:
    """Let Snakemake see what is lost behind work that is finished.

    It waits for the nearest inputs only. Where an unfinished directory reads a lost one, what
    stands between them loses its declared name, so that it is looked at: the lost one is made
    again, and what was made from it is declared again if that came out the same (`abf.stage`).

    Args:
        made_from: planned place -> places it reads.
    """
    whole = {place for place in made_from if (results / place / MANIFEST).exists()}
    readers = [p for p, ups in made_from.items() if p not in whole and not lost.isdisjoint(ups)]
    between = {up for reader in readers for up in _above(reader, made_from)}
    for place in between & whole:
        if not lost.isdisjoint(_above(place, made_from)):
            (results / place / MANIFEST).unlink()


def _above(place: str, made_from: Mapping[str, Sequence[str]]) -> set[str]:
    found: set[str] = set()
    queue = list(made_from.get(place, ()))
    while queue:
        if (up := queue.pop()) not in found:
            found.add(up)
            queue.extend(made_from.get(up, ()))
    return found


def restore_books(results: Path, store: Store) -> list[str]:
    """Bring back plans, if there is none, and the scheduler's records; what came back."""
    came = []
    if not any((results / "plan").glob("*.json")):
        for path in sorted((store.root / "plan").glob("*.json")):
            copy_file(path, results / "plan" / path.name)
            came.append(f"plan/{path.name}")
    before = kept_records(results)
    both = merge_records(kept_records(store.root), before)
    if len(both) > len(before):
        store_records(results, both)
        came.append(f"{len(both) - len(before)} records of jobs")
    return came
