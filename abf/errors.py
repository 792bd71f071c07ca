"""Errors a user can act on: each message names what, where, the offending value and the fix.

`assert` is for invariants of our own; everything below is for people.
"""


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


class Interrupted(AbfError):
    """A signal asked us to stop; state was saved and the same command goes on from there.

    75 is EX_TEMPFAIL of sysexits.h: "try again later".
    """

    exit_code = 75
