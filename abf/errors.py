"""Errors a user can act on: each message names what, where, the offending value and the fix.

`assert` is for invariants of our own; everything below is for people.
"""

from __future__ import annotations

import errno
import os


class AbfError(Exception):
    """Base of every error shown to a user without a traceback."""

    exit_code = 1


class ConfigError(AbfError):
    """A configuration that cannot be run; names the key path, the value and what is allowed."""

    exit_code = 2


class ArtifactError(AbfError):
    """A file of the pipeline that is missing, truncated or of another schema; names the path."""

    exit_code = 3


class DataError(AbfError):
    """Input text that cannot be used; names the file and the offset."""

    exit_code = 4


class ResumeError(AbfError):
    """A checkpoint that does not fit the run that wants to resume from it."""

    exit_code = 5


class LockError(AbfError):
    """Somebody else is writing here; names who."""

    exit_code = 6


class DivergenceError(AbfError):
    """The loss stopped being a number; names the step and the batch."""

    exit_code = 7


class ClusterError(AbfError):
    """The scheduler refused, lost or ended a job; says what it said, and what to do."""

    exit_code = 8


class BudgetError(AbfError):
    """Node-hours that would go past a cap; gives the sum, and what to change."""

    exit_code = 9


class RankError(AbfError):
    """Another rank of a training died or hangs; names it, its host and what it was doing."""

    exit_code = 10


class Interrupted(AbfError):
    """A signal asked us to stop; state was saved and the same command goes on from there.

    75 is EX_TEMPFAIL of sysexits.h: "try again later".
    """

    exit_code = 75

    def __init__(self, message: str, *, requeue: bool = False) -> None:
        super().__init__(message)
        self.requeue = requeue
        """The time limit was near, nobody cancelled: a scheduler's job should queue again."""


FULL = "the disk is full; nothing half-written was kept: free space"
DENIED = "you have no permission: change owner or mode, or use another folder"
REMEDIES = {
    errno.ENOSPC: FULL,
    errno.EDQUOT: FULL,
    errno.EROFS: "the file system is read-only: mount it writable, or use another folder",
    errno.EACCES: DENIED,
    errno.EPERM: DENIED,
    errno.ENOTDIR: "a part of the path is a file, not a folder: move it away or name another path",
    errno.EISDIR: "this is a folder, not a file: name a file, or move the folder away",
    errno.EEXIST: "something else has this name: move it away",
    errno.ENAMETOOLONG: "the name is too long: use shorter names",
    errno.EIO: "the disk failed: have it looked at",
    errno.ESTALE: "the network file system lost it: wait until it is back",
    errno.EMFILE: "too many files are open: raise `ulimit -n`",
}
"""What a user can do about an OSError."""


def os_fault(error: Exception) -> str | None:
    """What went wrong with which file and what to do; none for what no user can act on."""
    if not isinstance(error, OSError):
        return None
    remedy = REMEDIES.get(error.errno or 0)
    # Writing to an open file names none; a full disk is clear all the same.
    if remedy is None or (error.filename is None and remedy is not FULL):
        return None
    where = "" if error.filename is None else f"{os.fsdecode(error.filename)}: "
    return f"{where}{remedy}, and run the same command again ({error.strerror})"
