"""Boxes that belong to a process: ended with it, or by the next one if it was killed."""

from __future__ import annotations

import fcntl
import os
import tempfile
from pathlib import Path

from tests.slurm.box import remove

PREFIX = "abf-slurm-session-"


class Owner:
    """A new folder for a box of this process, locked as long as the process lives.

    The lock is the kernel's: it ends with its holder, however that ends. Children must not
    inherit it; Python's do not.
    """

    def __init__(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._lock = (self.root / "owner.new").open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._lock.write(f"{os.getpid()}\n")
        self._lock.flush()
        (self.root / "owner.new").rename(self.root / "owner")  # never seen without its lock

    def release(self) -> None:
        """End the box and delete its folder."""
        (self.root / "owner").unlink()
        remove(self.root)
        self._lock.close()


def remove_orphans() -> list[Path]:
    """End and delete the boxes of dead owners; returns their folders."""
    removed = []
    for owner in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/owner"):
        try:
            lock = owner.open()
        except FileNotFoundError:
            continue  # its owner or another session was quicker
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                continue
            # The mark of an orphan goes last: a clean-up that is interrupted is done again.
            remove(owner.parent)
            owner.unlink(missing_ok=True)
            owner.parent.rmdir()
            removed.append(owner.parent)
    return removed
