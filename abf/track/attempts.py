"""One record per attempt at a stage, however the attempt ends: the ledger is built from these.

`attempts.jsonl` gets a RUNNING line when an attempt starts and a closing line when it ends; a
heartbeat file is touched every few seconds, so that the length of a killed attempt is known too.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil
from pydantic_core import from_json

from abf.errors import AbfError, ArtifactError, Interrupted

ATTEMPTS = "attempts.jsonl"
COMMON = {"attempt", "job_id", "host", "rule", "run", "cores", "gpus", "start", "state"}
FIELDS = {True: COMMON | {"pid", "pid_start"}, False: COMMON | {"reason", "end", "elapsed_s"}}
"""What a record must hold, by whether it opens an attempt."""
HEARTBEAT = ".heartbeat"
SPARE = ".spare"
"""Holds the place of an attempt's closing record, which must say so when the disk is full."""
SPARE_BYTES = 1 << 14
HEARTBEAT_SECONDS = 5.0
LONGEST = 500
"""Characters of a foreign error's text."""


def read_attempts(directory: Path) -> list[dict[str, Any]]:
    """Records of a stage directory, oldest first; a torn last line (a crash) is left out.

    Raises:
        ArtifactError: a line is no record; names the file, the line and what is wrong.
    """
    path = directory / ATTEMPTS
    if not path.exists():
        return []
    *lines, _torn = path.read_bytes().split(b"\n")
    return [_record(line, f"{path}:{number}") for number, line in enumerate(lines, start=1)]


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = from_json(line)  # a ledger reads a million of these: half of json's time
    except ValueError as error:
        wrong = f"is not JSON ({str(error).partition(' at line ')[0]})"
    else:
        if not isinstance(record, dict):
            wrong = f"holds a {type(record).__name__}, not a record"
        elif missing := FIELDS[record.get("state") == "RUNNING"] - record.keys():
            wrong = f"lacks {', '.join(sorted(missing))}"
        else:
            return record
    raise ArtifactError(
        f"{where} {wrong}, so this version of abf did not write it: {line[:60]!r}. Delete the line "
        "(the attempt is then missing from the ledger) and run the same command again"
    )


def _append(directory: Path, record: Mapping[str, Any]) -> None:
    path = directory / ATTEMPTS
    with open(path, "ab+") as handle:
        # A crash can leave half a line; the next record must not be glued to it.
        if handle.tell() and (handle.seek(-1, os.SEEK_END), handle.read(1))[1] != b"\n":
            content = path.read_bytes()
            os.truncate(path, content.rfind(b"\n") + 1)
        handle.write((json.dumps(record, sort_keys=True) + "\n").encode())


def _close(directory: Path, record: Mapping[str, Any]) -> None:
    """Write the closing record, on a full disk in the place that was kept for it."""
    spare = directory / SPARE
    try:
        _append(directory, record)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        spare.unlink(missing_ok=True)
        _append(directory, record)
    spare.unlink(missing_ok=True)


def job_id() -> str:
    """The scheduler's job id, or this process and its start time (unique on the machine)."""
    if slurm := os.environ.get("SLURM_JOB_ID"):
        return slurm
    return f"{os.getpid()}.{psutil.Process().create_time():.2f}"


def is_schedulers(job_id: str) -> bool:
    """Whether an attempt's id is one of a scheduler's: `job_id` makes others of two numbers."""
    return job_id.isdigit()


@contextlib.contextmanager
def attempt(directory: Path, *, rule: str, run: str, cores: int) -> Iterator[dict[str, Any]]:
    """Record this attempt; what the body puts into the yielded dict joins the closing record.

    Args:
        directory: the stage directory; the caller holds its lock.
        rule: stage name.
        run: key of the stage directory.
        cores: processor cores the job was given.
    """
    number = 1 + max((r["attempt"] for r in read_attempts(directory)), default=0)
    start = time.time()
    heartbeat = directory / HEARTBEAT
    # Our own heartbeat overwrites the last sign of life of an attempt that was killed.
    last_heartbeat = heartbeat.stat().st_mtime if heartbeat.exists() else None
    record: dict[str, Any] = {
        "attempt": number,
        "job_id": job_id(),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "pid_start": psutil.Process().create_time(),
        "rule": rule,
        "run": run,
        "cores": cores,
        "gpus": 0,
        "start": start,
    }
    (directory / SPARE).write_bytes(os.urandom(SPARE_BYTES))  # not zeros: a disk may leave them out
    _append(directory, record | {"state": "RUNNING", "last_heartbeat": last_heartbeat})
    heartbeat.touch()
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            # The folder may be removed by hand while we run; that must not end the job.
            with contextlib.suppress(FileNotFoundError):
                os.utime(heartbeat)

    thread = threading.Thread(target=beat, name="heartbeat", daemon=True)
    thread.start()
    extra: dict[str, Any] = {}
    state, reason = "FAILED", "unknown"
    try:
        yield extra
        state, reason = "COMPLETED", ""
    except (Interrupted, KeyboardInterrupt) as error:
        state, reason = "INTERRUPTED", str(error) or "keyboard interrupt"
        raise
    except BaseException as error:
        if isinstance(error, AbfError):
            reason = str(error)  # whole: it ends in what to do
        else:
            reason = f"{type(error).__name__}: {error}"
            reason = reason if len(reason) <= LONGEST else reason[: LONGEST - 1] + "…"
        raise
    finally:
        stop.set()
        thread.join()
        end = time.time()
        times = os.times()
        closing = {
            "state": state,
            "reason": reason,
            "end": end,
            "elapsed_s": end - start,
            "core_seconds": times.user + times.system + times.children_user + times.children_system,
        }
        _close(directory, record | closing | extra)
