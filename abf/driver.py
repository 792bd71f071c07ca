"""One driver at a time on a results folder; the second is told who holds it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from abf.files import lock

_held = contextlib.ExitStack()


def claim(results: Path, study: str) -> None:
    """Hold the results folder until this process ends, however it ends.

    Snakemake's own lock outlives a killed driver and does not say whose it is; the profiles switch
    it off in favour of this one.

    Raises:
        LockError: another driver holds it; names it.
    """
    _held.enter_context(lock(results / ".driver", f"snakemake on {study}"))
