"""The folders a study lives on: can it be written, what is left, and what a purge takes next.

Sizes in bytes, ages in days since a file was last read or written.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path

from abf.cluster.checks import Finding, fail, ok, warn
from abf.cluster.config import StorageConfig
from abf.cluster.slurm import call
from abf.errors import ClusterError
from abf.files import real_path

GIB, GB = 1024**3, 10**9
LEAST_FREE = GIB
"""Less than this is as good as full: one checkpoint does not fit."""
LOW_SHARE = 0.05
PURGE_SHARE = 0.8
"""Of the purge age: files older than this are named while there is time to touch or copy them."""
WALK_ENTRIES = 200_000
"""Files looked at in one tree; more would keep a metadata server busy for minutes."""
LFS_COLUMNS = 8
"""Of `lfs quota -q`: kbytes, quota, limit, grace, files, quota, limit, grace."""


@dataclass(frozen=True)
class Tree:
    """What a walk over a folder found."""

    files: int
    size: int
    old: int
    """Files older than was asked."""
    oldest: Path | None
    oldest_days: float
    written_days: float
    """Since any of the files was last written; infinite where there is none."""
    whole: bool
    """Whether all of it was looked at."""


def survey(
    folder: Path, *, older_days: float = float("inf"), skip: Collection[str] = frozenset()
) -> Tree:
    """Walk a folder, at most WALK_ENTRIES files; folders that may not be read are passed over.

    Args:
        older_days: age from which a file counts as old.
        skip: names that are passed over.
    """
    now, pending = time.time(), [os.fspath(folder)]
    files = size = old = 0
    oldest, oldest_days, written_days = None, 0.0, float("inf")
    while pending:
        try:
            entries = list(os.scandir(pending.pop()))
        except OSError:  # a colleague's, or gone since: not ours to judge
            continue
        for entry in entries:
            if entry.name in skip:
                continue
            try:
                if entry.is_dir(follow_symlinks=False):
                    pending.append(entry.path)
                    continue
                found = entry.stat(follow_symlinks=False)
            except OSError:  # work goes on while we look
                continue
            age = (now - max(found.st_atime, found.st_mtime)) / 86400
            files, size, old = files + 1, size + found.st_size, old + (age > older_days)
            written_days = min(written_days, (now - found.st_mtime) / 86400)
            if oldest is None or age > oldest_days:
                oldest, oldest_days = Path(entry.path), age
            if files >= WALK_ENTRIES:
                return Tree(files, size, old, oldest, oldest_days, written_days, whole=False)
    return Tree(files, size, old, oldest, oldest_days, written_days, whole=True)


def disks(results: Path, storage: StorageConfig) -> Iterator[Finding]:
    """Every folder: the results', the project's, the scratch area.

    Raises:
        ConfigError: results and copies lie in one another.
    """
    yield space("results", results, key="--results")
    for name, path in (("work", storage.work), ("scratch", storage.scratch)):
        if path is None:
            yield warn(name, f"not looked at: name the folder in the site file, `storage.{name}`")
        else:
            yield space(name, path, key=f"storage.{name}", must_exist=True)
    if storage.work is not None and storage.work.is_dir():
        yield from quota(storage.work, storage.work_quota_gb)
    if storage.scratch is not None and storage.scratch.is_dir():
        yield purge(storage.scratch, storage.purge_days)
        if storage.on_scratch(results):
            place = f"{real_path(results)} lies on scratch, where files vanish unread"
            if (kept := storage.kept(results)) is None:
                yield warn(
                    "results", f"{place}, and nothing is copied: {storage.not_kept(results)}"
                )
            else:
                yield ok("results", f"{place}; what is finished is copied to {kept}")


def space(name: str, path: Path, *, key: str, must_exist: bool = False) -> Finding:
    """Whether a file can be written there and what the file system has left."""
    place = real_path(path)
    if must_exist and not place.is_dir():
        return fail(name, f"{path} is no folder: correct {key}")
    while not place.exists():
        place = place.parent
    try:
        with tempfile.TemporaryFile(dir=place) as handle:
            handle.write(b"doctor")
    except OSError as error:
        return fail(
            name,
            f"nothing can be written below {place} ({error.strerror}): free space, mend its mode, "
            f"or name another folder ({key})",
        )
    status = os.statvfs(place)
    free, total = free_bytes(place), status.f_blocks * status.f_frsize
    text = f"{place}: {free / GIB:,.1f} of {total / GIB:,.1f} GiB free"
    if free < LEAST_FREE:
        return fail(name, f"{text}: as good as full; free space or name another folder ({key})")
    if status.f_files and status.f_favail < 1000:
        return fail(name, f"{text}, but only {status.f_favail} more files may be made: delete some")
    if free < LOW_SHARE * total:
        return warn(name, f"{text}, less than {LOW_SHARE:.0%}: free space soon")
    return ok(name, text)


def spoken(size: float) -> str:
    """Bytes as people say them."""
    unit, name = (GB, "GB") if size >= GB / 10 else (10**6, "MB")
    return f"{size / unit:,.1f} {name}"


def free_bytes(path: Path) -> int:
    """What its file system has left for a user; the folder itself need not be there yet."""
    place = real_path(path)
    while not place.exists():
        place = place.parent
    status = os.statvfs(place)
    return status.f_bavail * status.f_frsize


@dataclass(frozen=True)
class Quota:
    """Bytes of a project area."""

    used: float
    limit: float
    who: str
    """Who counted."""


def read_quota(work: Path, limit_gb: float | None, trouble: list[str]) -> Quota | None:
    """The project's quota: as Lustre counts it, else as a walk does; none where nobody knows.

    Args:
        trouble: told why Lustre's own count is not known.
    """
    try:
        counted = lustre_quota(work)
    except ClusterError as error:
        trouble.append(str(error))
        counted = None
    if counted is not None:
        return Quota(*counted, "as Lustre counts the folder's group")
    if limit_gb is None:
        return None
    tree = survey(work)
    more = "" if tree.whole else f"; the first {tree.files} only, so it is more"
    who = f"counted over {tree.files} files against storage.work_quota_gb{more}"
    return Quota(tree.size, limit_gb * GB, who)


def quota(work: Path, limit_gb: float | None) -> Iterator[Finding]:
    """What is left of the project's quota."""
    trouble: list[str] = []
    found = read_quota(work, limit_gb, trouble)
    for text in trouble:
        yield warn("quota", f"not known for {work}: {text}")
    if found is None:
        yield warn("quota", f"not known for {work}: set storage.work_quota_gb in the site file")
        return
    used, limit = found.used, found.limit
    text = f"{work}: {used / GB:,.1f} of {limit / GB:,.1f} GB used ({found.who})"
    if limit - used < LEAST_FREE:
        yield fail("quota", f"{text}: nothing more fits; `abf gc`, or delete or move results")
    elif used > (1 - 2 * LOW_SHARE) * limit:
        yield warn("quota", f"{text}: more than {1 - 2 * LOW_SHARE:.0%}; free space soon")
    else:
        yield ok("quota", text)


def lustre_quota(folder: Path) -> tuple[float, float] | None:
    """Used and allowed bytes of the folder's group; None off Lustre or without a limit.

    Raises:
        ClusterError: `lfs quota` failed.
    """
    if shutil.which("lfs") is None:
        return None
    text = call("lfs", "quota", "-q", "-g", str(folder.stat().st_gid), str(folder), timeout=30)
    # The path comes first, on a line of its own when it is long.
    words = text.split()[-LFS_COLUMNS:]
    if len(words) < LFS_COLUMNS:
        raise ClusterError(f"lfs quota printed {text.strip()!r}")
    used, soft, hard = (float(word.rstrip("*")) * 1024 for word in words[:3])
    limit = hard or soft
    return (used, limit) if limit else None


def purge(scratch: Path, days: int | None) -> Finding:
    """Files that the site will delete soon."""
    if days is None:
        return warn("purge", "the age is not known: set storage.purge_days in the site file")
    tree = survey(scratch, older_days=PURGE_SHARE * days)
    part = "" if tree.whole else f" (of the first {tree.files} looked at)"
    if tree.old:
        left = days - tree.oldest_days
        when = f"goes in {left:.0f} day(s)" if left > 0 else "is overdue"
        return warn(
            "purge",
            f"{tree.old} file(s) on {scratch} are older than {PURGE_SHARE * days:.0f} of {days} "
            f"days{part}; the oldest, {tree.oldest}, {when}: copy what must last to storage.work",
        )
    return ok("purge", f"no file of {tree.files} on {scratch} is near {days} days{part}")
