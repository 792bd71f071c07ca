"""Copy files of a stage directory so that only whole, verified ones ever have their names.

A file is written under a name of its own, hashed as it is read, flushed, and renamed. Whoever
copies into a folder that a killed copy left goes on after its last whole file. Times of writing are
kept (Snakemake compares them); the time of reading is now, so that no purge takes a fresh copy.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from abf.cluster.jobs import RECORD
from abf.errors import ArtifactError
from abf.files import fsync_path
from abf.instance import LAUNCH
from abf.stage import DONE
from abf.stages import CONFIG, MANIFEST, STAGES
from abf.track.attempts import ATTEMPTS
from abf.track.progress import Progress

CHUNK = 8 * 1024**2
MB = 10**6
PART = ".part"
"""Suffix of a file that is being copied."""
JOURNAL = "journal.jsonl"
BESIDE = (LAUNCH, JOURNAL, RECORD)
"""Files of a stage directory that its manifest does not list, attempts and settings apart."""
SAMPLES = "system*.jsonl"
"""What was sampled of processors and memory, a file for each node."""

Entry = Mapping[str, Any]
"""What a manifest says of a file: bytes, sha256, mtime_ns."""


class Unfaithful(ArtifactError):
    """What was to be copied is not what its manifest says."""


def copy_payload(
    source: Path, target: Path, manifest: Mapping[str, Any], *, each: Callable[[int], None]
) -> None:
    """Copy what a manifest lists from one folder into another, and flush it.

    Args:
        target: made when it is not there; files that an earlier call finished are left alone.
        each: told the bytes of every piece that is done.

    Raises:
        Unfaithful: a file of `source` is missing or has another content than its manifest says.
    """
    files: Mapping[str, Entry] = manifest["files"]
    for name in STAGES[manifest["stage"]].payload:
        if name not in files:  # a folder, which may be empty
            (target / name).mkdir(parents=True, exist_ok=True)
    for name, entry in files.items():
        if _there(target / name, entry):
            each(entry["bytes"])
        else:
            copy_file(source / name, target / name, entry, each=each)
    for folder in {target, *(parent for name in files for parent in (target / name).parents)}:
        if folder.is_relative_to(target):
            fsync_path(folder)


def _there(path: Path, entry: Entry) -> bool:
    # The name is given only to whole files whose content was verified, the time to this version's.
    if not path.exists():
        return False
    status = path.stat()
    return (status.st_size, status.st_mtime_ns) == (entry["bytes"], entry.get("mtime_ns"))


def copy_file(
    source: Path,
    target: Path,
    entry: Entry | None = None,
    *,
    each: Callable[[int], None] = lambda size: None,
) -> None:
    """Copy one file with its time of writing; hold its content against `entry` where there is one.

    Raises:
        Unfaithful: the source is missing, or is not what `entry` says.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + PART)
    digest = hashlib.sha256()
    try:
        reading = open(source, "rb")  # noqa: SIM115
    except FileNotFoundError:
        raise Unfaithful(f"{source} is missing") from None
    with reading, open(temporary, "wb") as writing:
        while chunk := reading.read(CHUNK):
            writing.write(chunk)
            digest.update(chunk)
            each(len(chunk))
        writing.flush()
        os.utime(writing.fileno(), ns=(time.time_ns(), os.fstat(reading.fileno()).st_mtime_ns))
        os.fsync(writing.fileno())
    if entry is not None and digest.hexdigest() != entry["sha256"]:
        temporary.unlink()
        raise Unfaithful(f"{source} is not what its manifest says: it has another sha256")
    os.replace(temporary, target)


def joined(older: bytes, newer: bytes) -> bytes:
    """Lines of two copies of one append-only file: all of both, each once."""
    for one, other in ((older, newer), (newer, older)):
        if other.startswith(one):
            return other
    known = set(older.splitlines())
    added = [line for line in newer.splitlines(keepends=True) if line.rstrip(b"\n") not in known]
    return older + b"".join(added)


def copy_beside(source: Path, target: Path, *, older: bool = False) -> None:
    """Copy what a manifest does not list: settings, journal, records of attempts and jobs.

    Attempts that are on record only in `target` stay on record.

    Args:
        older: what `source` has on record was written before what `target` has, if they differ.
    """
    samples = sorted(path.name for path in source.glob(SAMPLES))
    for name in (CONFIG, *BESIDE, *samples):
        if (source / name).exists() and not _stays(target / name, source / name):
            copy_file(source / name, target / name)
    if not (source / ATTEMPTS).exists():
        return
    there = (source / ATTEMPTS).read_bytes()
    here = (target / ATTEMPTS).read_bytes() if (target / ATTEMPTS).exists() else b""
    both = joined(there, here) if older else joined(here, there)
    if both != here:
        # Always the same name: what a killed copy left is written over.
        temporary = target / (ATTEMPTS + PART)
        temporary.write_bytes(both)
        fsync_path(temporary)
        os.replace(temporary, target / ATTEMPTS)


def _stays(target: Path, source: Path) -> bool:
    """Whether a file is left as it is: the same, or newer. Settings belong to their manifest."""
    if not target.exists():
        return False
    here, there = target.stat(), source.stat()
    if (here.st_size, here.st_mtime_ns) == (there.st_size, there.st_mtime_ns):
        return True
    return target.name != CONFIG and here.st_mtime_ns > there.st_mtime_ns


def same_time(source: Path, target: Path) -> None:
    """Give `target` the time at which `source` was written."""
    written = source.stat().st_mtime_ns
    if target.stat().st_mtime_ns != written:
        os.utime(target, ns=(time.time_ns(), written))


def seal(source: Path, target: Path) -> None:
    """Give a copy the marks of finished work, last of all, with their times of writing."""
    if (source / DONE / CONFIG).exists():
        copy_file(source / DONE / CONFIG, target / DONE / CONFIG)
    copy_file(source / MANIFEST, target / DONE / MANIFEST)
    fsync_path(target / DONE)
    temporary = target / f".{MANIFEST}.tmp"
    temporary.unlink(missing_ok=True)
    os.link(target / DONE / MANIFEST, temporary)
    os.replace(temporary, target / MANIFEST)
    fsync_path(target)


@contextlib.contextmanager
def megabytes(label: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Progress in megabytes; the function it yields takes bytes and the place they belong to."""
    if not total:
        yield lambda size, place: None
        return
    with Progress(label, -(-total // MB), unit="MB") as progress:
        moved = 0

        def count(size: int, place: str) -> None:
            nonlocal moved
            moved += size
            progress.update(moved // MB - progress.done, place=place)

        yield count
