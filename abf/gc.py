"""`abf gc`: what may be deleted, why, and how much it is; deleted only when told to."""

from __future__ import annotations

import contextlib
from pathlib import Path

from abf.cluster.disks import spoken
from abf.errors import ArtifactError
from abf.files import lock
from abf.grid import load_study
from abf.keeping.store import Store
from abf.keeping.waste import BIN, find, planned_places, remove
from abf.plan import Plan
from abf.site import load_storage


def collect(results: Path, study: Path | None, *, yes: bool) -> None:
    """List what the policy of `abf.keeping.waste` lets go; delete it when told to.

    Args:
        study: grid or run YAML: its directories only; None: all below `results`.

    Raises:
        ArtifactError: there is no plan, so that everything would seem to be unwanted.
        ClusterError: there is a scheduler, and it does not answer.
        LockError: another process copies or deletes.
    """
    storage = load_storage()
    store = Store.of(results, storage)
    planned, only = planned_places(results, store), None
    if study is not None:
        plan = Plan(load_study(study), results)
        only = {instance.place for instance in plan.instances.values()}
        planned |= only
    if not planned:
        raise ArtifactError(
            f"no plan below {results}: everything would look unwanted. `abf plan STUDY.yaml` "
            "writes the plan of every study that is to stay"
        )
    with contextlib.ExitStack() as held:
        if yes:
            held.enter_context(lock(results / BIN, "abf gc"))
            if store is not None and store.root.is_dir():
                held.enter_context(store.held("abf gc"))
        waste = list(find(results, store, planned=planned, keep_days=storage.keep_days, only=only))
        for one in waste:
            print(f"{spoken(one.size):>12} {one.files:>7} files  {one.path}: {one.why}")
        total = spoken(sum(one.size for one in waste))
        if not yes or not waste:
            print(
                f"{total} may go" + ("; nothing was deleted: `--yes` deletes it" if waste else "")
            )
            return
        freed = 0
        for one, trouble in remove(waste, results):
            freed += 0 if trouble else one.size
            print(f"left: {trouble}" if trouble else f"deleted {one.path}", flush=True)
        print(f"{spoken(freed)} of {total} deleted")
