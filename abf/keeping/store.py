"""The kept copies of one results folder: finished stage directories, plans, job records.

`{storage.work}/abf-results/{name}/` has the layout of a results folder, less what a finished stage
no longer needs. `results.json` says whose copies these are, `places.json` lists every directory
that was seen finished, copied or not. One process at a time writes; a directory stands under its
name only when it is whole. Sizes in bytes.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abf.artifacts import damage
from abf.cluster.config import StorageConfig
from abf.cluster.disks import LEAST_FREE, free_bytes, read_quota, spoken
from abf.errors import ArtifactError
from abf.files import fsync_path, lock, read_if_json, sha256, write_json
from abf.keeping.copies import (
    Unfaithful,
    copy_beside,
    copy_file,
    copy_payload,
    megabytes,
    same_time,
    seal,
)
from abf.ledger.slurm import kept_records, merge_records, store_records
from abf.stages import CONFIG, MANIFEST, STAGES

OWNER, LIST = "results.json", "places.json"


@dataclass
class Kept:
    """What a call copied."""

    copied: dict[str, int] = field(default_factory=dict)
    """Place -> bytes."""
    there: int = 0
    """Directories that were kept before, just as they are."""
    faults: list[str] = field(default_factory=list)
    """Finished directories that could not be copied, and why."""


class Store:
    """Kept copies of one results folder."""

    def __init__(self, root: Path, results: Path, storage: StorageConfig) -> None:
        self.root, self.results, self.storage = root, results, storage

    @staticmethod
    def of(results: Path, storage: StorageConfig) -> Store | None:
        """The copies of a results folder; none where the site file names no place for them."""
        root = storage.kept(results)
        return None if root is None else Store(root, results, storage)

    def check(self) -> None:
        """Refuse to go on without the project area: every copy would seem to be lost.

        Raises:
            ArtifactError: it is not there.
        """
        work = self.storage.work
        assert work is not None
        if not work.is_dir():
            raise ArtifactError(
                f"storage.work={work} is no folder: correct the site file, or wait until the file "
                "system is mounted"
            )

    @contextlib.contextmanager
    def held(self, what: str) -> Iterator[None]:
        """Be the only one who writes.

        Raises:
            LockError: another process does; names it.
            ArtifactError: the project area is not there.
        """
        self.check()
        with lock(self.root, what):
            if not (self.root / OWNER).exists():
                here = {"results": os.path.realpath(self.results), "host": socket.gethostname()}
                write_json(self.root / OWNER, here | {"since": time.strftime("%Y-%m-%d %H:%M:%S")})
            for stray in [*self.root.glob(".*.tmp"), *(self.root / ".driver").glob(".*.tmp")]:
                stray.unlink()
            for old in _hidden(self.root, ".old"):
                _mend(old)
            yield

    def manifest(self, place: str) -> dict[str, Any] | None:
        """Manifest of a kept copy."""
        return read_if_json(self.root / place / MANIFEST)

    def listed(self) -> dict[str, dict[str, Any]]:
        """Everything that was seen finished: place -> hash of its manifest, bytes."""
        return read_if_json(self.root / LIST) or {}

    # --- copying in ------------------------------------------------------------------------

    def keep(self, places: Iterable[str]) -> Kept:
        """Copy what is finished and not kept yet; the caller holds the store.

        Raises:
            ArtifactError: it does not fit, by numbers, before anything is copied; or the target
                cannot be written.
        """
        done, todo = Kept(), {}
        seen = self.listed()
        for place in places:
            manifest = declared(self.results / place, place)
            if manifest is None:
                continue
            size = sum(entry["bytes"] for entry in manifest["files"].values())
            mark = sha256(self.results / place / MANIFEST)
            seen[place] = {"sha256": mark, "bytes": size}
            if self._has(place, mark):
                done.there += 1
                copy_beside(self.results / place, self.root / place)
                # It may have been declared again since, after inputs that were made again.
                same_time(self.results / place / MANIFEST, self.root / place / MANIFEST)
            elif fault := damage(self.results / place, manifest):
                done.faults.append(fault)
            else:
                todo[place] = (manifest, size, mark)
        if seen != self.listed():
            write_json(self.root / LIST, seen)
        self.keep_books()
        self._refuse(sum(size for _, size, _ in todo.values()), len(todo))
        with megabytes("keep", sum(size for _, size, _ in todo.values())) as count:
            for place, (manifest, size, mark) in todo.items():
                try:
                    self._copy(place, manifest, mark, count)
                except Unfaithful as error:
                    done.faults.append(str(error))
                else:
                    done.copied[place] = size
        return done

    def _has(self, place: str, mark: str) -> bool:
        manifest = self.manifest(place)
        return (
            manifest is not None
            and sha256(self.root / place / MANIFEST) == mark
            and damage(self.root / place, manifest) is None
        )

    def _refuse(self, size: int, directories: int) -> None:
        work = self.storage.work
        assert work is not None
        if not size:
            return
        what = f"{directories} finished directories of {spoken(size)} do not fit {work}"
        free = free_bytes(work)
        if size + LEAST_FREE > free:
            raise ArtifactError(
                f"{what}: {spoken(free)} are free, and {spoken(LEAST_FREE)} must stay so; nothing "
                "was copied. Free space there (`abf gc` lists what may go), then `abf keep`"
            )
        quota = read_quota(work, self.storage.work_quota_gb, [])
        if quota is not None and quota.used + size > quota.limit:
            raise ArtifactError(
                f"{what}: {spoken(quota.used)} of {spoken(quota.limit)} are used ({quota.who}), "
                f"{spoken(quota.used + size - quota.limit)} too many; nothing was copied. Delete "
                "there (`abf gc` lists what may go) or ask for more, then `abf keep`"
            )

    def _copy(
        self, place: str, manifest: dict[str, Any], mark: str, count: Callable[[int, str], None]
    ) -> None:
        source, final = self.results / place, self.root / place
        temporary = final.with_name(f".{final.name}.{mark[:8]}.tmp")
        for other in final.parent.glob(f".{final.name}.*.tmp"):
            if other != temporary:  # of work that was made again since
                shutil.rmtree(other)
        copy_payload(source, temporary, manifest, each=lambda size: count(size, place))
        if final.exists():
            copy_beside(final, temporary)
        copy_beside(source, temporary)
        seal(source, temporary)
        if sha256(temporary / MANIFEST) != mark:
            raise Unfaithful(f"{source} was made again while it was copied: copied next time")
        old = final.with_name(f".{final.name}.old")
        if final.exists():
            os.rename(final, old)
        os.rename(temporary, final)
        fsync_path(final.parent)
        if old.exists():
            shutil.rmtree(old)

    def keep_books(self) -> None:
        """Copy plans and the scheduler's records; what is kept is only ever added to."""
        for path in (self.results / "plan").glob("*.json"):
            kept = self.root / "plan" / path.name
            if not kept.exists() or kept.read_bytes() != path.read_bytes():
                copy_file(path, kept)
        before, here = kept_records(self.root), kept_records(self.results)
        if (records := merge_records(before, here)) != before:
            store_records(self.root, records)


def _mend(old: Path) -> None:
    """Finish what a killed exchange of two copies began."""
    final = old.with_name(old.name[1 : -len(".old")])
    if (final / MANIFEST).exists():
        shutil.rmtree(old)
    else:
        os.rename(old, final)


def unfinished_copies(root: Path) -> list[Path]:
    """What copies that were killed left; the next one goes on with them."""
    return _hidden(root, ".tmp")


def _hidden(root: Path, suffix: str) -> list[Path]:
    folders = [root / stage for stage in STAGES]
    folders += [path for path in (root / "decode").glob("*") if path.is_dir()]
    return [path for folder in folders for path in sorted(folder.glob(f".*{suffix}"))]


def declared(directory: Path, place: str) -> dict[str, Any] | None:
    """Manifest of a directory that is declared and is what its stage and settings would make."""
    path, config = directory / MANIFEST, directory / CONFIG
    manifest = read_if_json(path)
    if manifest is None or not config.exists():
        return None
    current = manifest["stage_version"] == STAGES[place.partition("/")[0]].version
    return manifest if current and manifest["config"] in (None, sha256(config)) else None
