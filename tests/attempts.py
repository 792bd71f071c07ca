"""Attempt records written by hand, as an attempt's recorder leaves them."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

from abf.track.attempts import ATTEMPTS


def record(directory: Path, number: int, start: float, **changes: Any) -> dict[str, Any]:
    """First line of an attempt on a stage directory, by a process that cannot live."""
    return {
        "attempt": number,
        "job_id": f"{directory.parent.name}-{directory.name}-{number}",
        "host": socket.gethostname(),
        "pid": 2**22 + 1,  # beyond pid_max: no such process
        "pid_start": start,
        "rule": directory.parent.name,
        "run": directory.name,
        "cores": 2,
        "gpus": 0,
        "start": start,
        "state": "RUNNING",
    } | changes


def closing(start: float, seconds: float, state: str, reason: str = "") -> dict[str, Any]:
    """What an attempt's last line adds to its first."""
    return {"state": state, "reason": reason, "end": start + seconds, "elapsed_s": seconds}


def write(directory: Path, *records: dict[str, Any], tail: str = "") -> Path:
    """These lines, and a torn one, as a stage directory's record; gives the directory."""
    directory.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(r) + "\n" for r in records) + tail
    (directory / ATTEMPTS).write_text(text)
    return directory
