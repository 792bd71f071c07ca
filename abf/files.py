"""Writing so that nothing half-done ever stands under a final name, and locks that die with us."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from abf.documents import parse_document
from abf.errors import ArtifactError, LockError


def fsync_path(path: Path) -> None:
    """Flush a file or a directory entry to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def real_path(path: Path) -> Path:
    """Where a path leads, through links; a circle of links is left as it is."""
    return Path(os.path.realpath(path))


def make_folder(path: Path) -> None:
    """Make a folder and those above it.

    Raises:
        ArtifactError: the file system takes none there (as in /proc); an OSError says more.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileNotFoundError as error:
        raise ArtifactError(
            f"{path}: no folder can be made here ({error.strerror}): name another place"
        ) from error


@contextlib.contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`; on success flush it and rename it, else remove it."""
    make_folder(path.parent)
    temporary = path.parent / f".{path.name}.{os.getpid()}.tmp"
    try:
        yield temporary
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise ArtifactError(
                f"disk full while writing {path}; nothing was left under that name"
            ) from error
        raise
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Write a small text file atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, readable and with a final newline."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")


def read_own(path: Path) -> dict[str, Any]:
    """JSON object of a file of our own that is there.

    Raises:
        ArtifactError: it is damaged; names it and the fault.
    """
    try:
        return parse_document(path, path.read_bytes())
    except ValueError as error:
        raise ArtifactError(
            f"{path} is damaged ({error}): delete it and run the same command again"
        ) from None


def read_if_json(path: Path) -> dict[str, Any] | None:
    """JSON of a file; none when it is missing or not what is written under its name."""
    try:
        return parse_document(path, path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None


def sha256(path: Path) -> str:
    """Hash of a file's bytes."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


@contextlib.contextmanager
def lock(
    directory: Path, what: str, *, wait: Callable[[str], None] | None = None
) -> Iterator[None]:
    """Hold `directory`/.lock; the kernel releases it when the process dies, however it dies.

    Args:
        directory: what is held.
        what: name of the holder, for others.
        wait: is told who holds it, and the lock is waited for; none: it is refused.

    Raises:
        LockError: another process holds it; names host, process and since when.
        ArtifactError: the folder is not there and cannot be made.
    """
    make_folder(directory)
    path = directory / ".lock"
    with open(path, "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            handle.seek(0)
            holder = handle.read().strip() or "a process that has not written its name yet"
            if wait is None:
                raise LockError(
                    f"{directory} is in use by {holder}; wait for it or end it, then run again"
                ) from None
            wait(holder)
            fcntl.flock(handle, fcntl.LOCK_EX)
        handle.truncate(0)
        since = time.strftime("%Y-%m-%d %H:%M:%S %z")
        handle.write(f"{what}, process {os.getpid()} on {socket.gethostname()} since {since}")
        handle.flush()
        yield
        handle.truncate(0)


@dataclass(frozen=True)
class Holder:
    """Who wrote a name into a lock file."""

    text: str
    process: int
    alive: bool | None
    """None: a process on another host."""


def lock_holder(path: Path) -> Holder | None:
    """Whose name a lock file holds; asked without taking the lock, which could refuse its owner."""
    text = path.read_text(encoding="utf-8") if path.exists() else ""
    found = re.search(r"process (\d+) on (\S+) since (\S+ \S+ \S+)$", text)
    if found is None:
        return None
    number, host, since = int(found[1]), found[2], found[3]
    if host != socket.gethostname():
        return Holder(text, number, None)
    try:
        began = psutil.Process(number).create_time()
    except psutil.NoSuchProcess:
        return Holder(text, number, False)
    # Process numbers are reused: a stranger began after the lock was taken.
    return Holder(
        text, number, began <= time.mktime(time.strptime(since[:19], "%Y-%m-%d %H:%M:%S")) + 1
    )
