"""`abf keep`: finished directories are copied to where nothing is purged, and come back from there.

The same happens by itself: what a purge took is restored before Snakemake looks at any file, and
what is finished is copied when a run begins and when it ends, whatever its end.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from abf.cluster.config import StorageConfig
from abf.cluster.disks import spoken
from abf.driver import claim, settle
from abf.errors import AbfError, ConfigError, os_fault
from abf.files import make_folder, real_path
from abf.grid import load_study
from abf.keeping.restore import Missing, missing, restore, restore_books, uncover
from abf.keeping.store import Store
from abf.keeping.waste import planned_places
from abf.plan import Plan
from abf.site import load_site, load_storage


def keep(results: Path, study: Path | None, *, back: bool) -> None:
    """Copy finished directories to the project area, or restore them from there.

    Args:
        study: grid or run YAML; None: everything that a plan names.
        back: restore what is missing instead of copying.

    Raises:
        ConfigError: the site file names no place for copies, or no plan names anything.
        ArtifactError: it does not fit; gives the numbers.
        LockError: another process copies.
    """
    storage = load_storage()
    store = Store.of(results, storage)
    if store is None:
        raise ConfigError(storage.not_kept(results))
    store.check()
    if back:
        make_folder(real_path(results))
        _tell(f"restored {name} from {store.root}" for name in restore_books(results, store))
    places = sorted(planned_places(results, store)) if study is None else _places(study, results)
    if not places:
        raise ConfigError(
            f"no plan below {results} or {store.root}: name the study, abf keep STUDY"
        )
    if back:
        gone = missing(places, results, store)
        lost = restore(gone, results, store, say=_say)
        back_again = len(gone) - len(lost)
        print(f"{back_again} of {len(places)} planned directories restored, {len(lost)} lost")
        return
    with store.held(f"abf keep of {results}"):
        done = store.keep(places)
    _tell(f"not kept: {fault}" for fault in done.faults)
    size = spoken(sum(done.copied.values()))
    print(
        f"{len(done.copied)} directories of {size} copied to {store.root}, {done.there} were there"
    )


# --- what a driver does ------------------------------------------------------------------------


def bring_back(plan: Plan, storage: StorageConfig, *, dry: bool, submits: bool) -> None:
    """Restore what the study lacks, before its plan is written: files keep their times.

    Args:
        dry: only say what would be restored.
        submits: whether a dead driver may have left jobs in a queue.

    Raises:
        LockError: another driver is at work.
        ArtifactError: the project area is not there, or there is no room to restore to.
        ClusterError: the scheduler does not answer.
    """
    store, places = Store.of(plan.results, storage), [i.place for i in plan.instances.values()]
    if store is not None:
        store.check()
    if not dry:
        # What a link points to may have been purged with all that was in it.
        make_folder(real_path(plan.results))
        claim(plan.results, str(plan.study.path))
        if store is not None:
            _tell(f"restored {n} from {store.root}" for n in restore_books(plan.results, store))
    gone = missing(places, plan.results, store)
    if dry:
        _tell(_would(one) for one in gone)
        return
    lost = frozenset(one.place for one in restore(gone, plan.results, store, say=_say))
    if lost:
        if submits:  # they read what is about to lose its name
            settle(plan.results, places, interval=load_site().poll_seconds)
        inputs = {i.place: [up.place for up in i.direct] for i in plan.instances.values()}
        uncover(lost, inputs, plan.results)


def keep_finished(plan: Plan, storage: StorageConfig) -> None:
    """Copy what the study has finished; what goes wrong is a warning and harms no study."""
    store = Store.of(plan.results, storage)
    if store is None:
        return
    try:
        with store.held(f"snakemake on {plan.study.path}"):
            done = store.keep([i.place for i in plan.instances.values()])
    except (AbfError, OSError) as error:
        _say(f"WARNING: finished work was not copied: {os_fault(error) or error}")
        return
    _tell(f"WARNING: not copied: {fault}" for fault in done.faults)
    if done.copied:
        size = spoken(sum(done.copied.values()))
        _say(f"kept {len(done.copied)} directories of {size} in {store.root}")


def _would(one: Missing) -> str:
    if one.size is None:
        return f"lost: {one.place}: {one.fault}; {one.why}"
    return f"would first be restored: {one.place} ({spoken(one.size)}): {one.fault}"


def _places(study: Path, results: Path) -> Sequence[str]:
    return [instance.place for instance in Plan(load_study(study), results).instances.values()]


def _tell(lines: Iterable[str]) -> None:
    for line in lines:
        _say(line)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
