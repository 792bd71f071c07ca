"""What became of every attempt at a stage, killed ones included; times are seconds since 1970 UTC.

A killed attempt leaves a RUNNING line and no closing one. It lasted until its last heartbeat: the
heartbeat file's time or, once a later attempt has touched that file, the time the later one noted.
"""

from __future__ import annotations

import socket
import time
from pathlib import Path
from typing import Any

import psutil

from abf.cluster.jobs import job_record
from abf.track.attempts import HEARTBEAT, HEARTBEAT_SECONDS, read_attempts

MISSED_BEATS = 12
"""Heartbeats a process on another host may miss (slow shared file systems) and still be alive."""


def attempt_outcomes(directory: Path) -> list[dict[str, Any]]:
    """One record per attempt of a stage directory, in order of the attempt number.

    Returns:
        records as `attempts.jsonl` holds them, each with `state` in {COMPLETED, FAILED,
        INTERRUPTED, KILLED, RUNNING}, `reason`, `end` and `elapsed_s`; for RUNNING the last two go
        up to the newest heartbeat.
    """
    records = read_attempts(directory)
    opened = {r["attempt"]: r for r in records if r["state"] == "RUNNING"}
    closed = {r["attempt"]: r for r in records if r["state"] != "RUNNING"}
    numbers = sorted(opened.keys() | closed.keys())
    outcomes = []
    for number in numbers:
        if number in closed:
            outcomes.append(closed[number])
            continue
        record = opened[number]
        later = next((opened[n] for n in numbers if n > number and n in opened), None)
        alive = later is None and _is_alive(record, directory)
        end = max(_last_sign_of_life(record, directory, later), record["start"])
        outcomes.append(
            record
            | {
                "state": "RUNNING" if alive else "KILLED",
                "reason": "" if alive else "ended without a closing record (killed or power lost)",
                "end": end,
                "elapsed_s": end - record["start"],
            }
        )
    return outcomes


def _last_sign_of_life(
    record: dict[str, Any], directory: Path, later: dict[str, Any] | None
) -> float:
    if later is not None:
        beat = later.get("last_heartbeat")
        return later["start"] if beat is None else beat
    heartbeat = directory / HEARTBEAT
    return heartbeat.stat().st_mtime if heartbeat.exists() else record["start"]


def _is_alive(record: dict[str, Any], directory: Path) -> bool:
    job = job_record(directory)
    if job.get("job_id") == record["job_id"] and "ended" in job:
        return False  # the scheduler knows before the heart has missed its beats
    if record["host"] != socket.gethostname():
        heartbeat = directory / HEARTBEAT
        if not heartbeat.exists():
            return False
        age = time.time() - heartbeat.stat().st_mtime
        return age < MISSED_BEATS * HEARTBEAT_SECONDS
    try:
        # Process numbers are reused; the start time tells a stranger from our process.
        return abs(psutil.Process(record["pid"]).create_time() - record["pid_start"]) < 0.01
    except psutil.NoSuchProcess:
        return False
