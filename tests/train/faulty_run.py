"""One rank of a tiny run, with a fault in the middle of its fifth step.

RANK=1 WORLD_SIZE=2 ABF_RENDEZVOUS=FILE python -m tests.train.faulty_run DIR '{}' kill 1
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

from abf.diffusion.loss import loss_terms
from abf.diffusion.terms import Term
from abf.errors import AbfError
from abf.train import forward
from tests.train.tiny_run import tiny_train


def fail_here(fault: str) -> None:
    """What befalls the rank."""
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "freeze":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif fault == "hang":
        time.sleep(600)
    elif fault == "bug":
        raise RuntimeError("shapes do not fit")
    elif fault == "file":
        raise AbfError("train.arrow went away")


def main() -> int:
    """Run; a user's error becomes a line and its exit code."""
    directory, changes, fault, rank = sys.argv[1:]
    calls = 0

    def terms(*args: Any, **kwargs: Any) -> dict[str, Term]:
        nonlocal calls
        calls += 1
        here = calls == 5 and os.environ["RANK"] == rank
        if here:
            fail_here(fault)
        found = loss_terms(*args, **kwargs)
        if here and fault == "nan":
            found["length"].sum = found["length"].sum * float("nan")
        return found

    forward.loss_terms = terms
    try:
        tiny_train(Path(directory), json.loads(changes))
    except AbfError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
