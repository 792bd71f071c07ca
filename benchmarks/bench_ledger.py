"""Ledger of 100,000 job attempts: seconds and peak memory of building it.

Wall-clock in a process of its own, reading its modules included. The scheduler is a stand-in that
prints the records it is given in sacct's form; `first` parses all of them, `again` finds them kept
and gets those of the last three days once more. Every attempt's row is checked in the same run.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from abf.track.attempts import ATTEMPTS
from benchmarks.statistics import Row

ATTEMPTS_EACH = 4
"""Attempts a directory: a job, its two requeues, and a second job."""
DAY = 86_400
SPAN_S = 180 * DAY
BUILD = """
import json, resource, sys, time
began = time.perf_counter()
from pathlib import Path
from abf.cluster.config import NodeConfig
from abf.ledger.build import build_ledger
from abf.ledger.slurm import scheduled_rows
results, out = Path("results"), Path(sys.argv[1])
places = json.loads(Path("places.json").read_text())
rows = scheduled_rows(results, places, node=NodeConfig())
counts = build_ledger(results, [results / p for p in places], out, scheduled=rows)
seconds = time.perf_counter() - began
used = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps(counts | {"seconds": seconds, "peak_mib": used.ru_maxrss / 1024,
    "cpu_s": used.ru_utime + used.ru_stime}))
"""


def run(quick: bool = False) -> list[Row]:
    """Rows of the benchmark table."""
    rounds, attempts = (2, 4_000) if quick else (5, 100_000)
    first, again = [], []
    with tempfile.TemporaryDirectory(dir=Path.cwd(), prefix=".bench-ledger-") as name:
        folder = Path(name).resolve()
        _write(folder, attempts)
        for number in range(rounds):
            (folder / "results/.driver/records.jsonl").unlink(missing_ok=True)
            first.append(_build(folder, f"first{number}", attempts))
            again.append(_build(folder, f"again{number}", attempts))
    detail = f"{attempts:,} attempts in {attempts // ATTEMPTS_EACH:,} directories, {rounds} rounds"
    return [
        _row("ledger, first", "seconds", "s", first, f"{detail}; goal below 10"),
        _row("ledger, again", "seconds", "s", again, f"{detail}; goal below 10"),
        _row("ledger, processor time", "cpu_s", "s", first + again, detail),
        _row("ledger, peak memory", "peak_mib", "MiB", first + again, f"{detail}; goal below 1024"),
    ]


def _row(figure: str, field: str, unit: str, found: list[dict[str, float]], detail: str) -> Row:
    values = np.asarray([counts[field] for counts in found])
    picks = np.random.default_rng(0).integers(len(values), size=(2000, len(values)))
    low, high = np.quantile(np.median(values[picks], axis=1), [0.025, 0.975])
    return Row(
        figure=figure,
        value=float(np.median(values)),
        low=float(low),
        high=float(high),
        unit=unit,
        detail=detail,
    )


def _write(folder: Path, attempts: int) -> None:
    """Records of `attempts` attempts, what their jobs wrote themselves, and a sacct to print."""
    directories = attempts // ATTEMPTS_EACH
    places = [f"train/sentence-s{i}-{i:08x}" for i in range(directories)]
    (folder / "places.json").write_text(json.dumps(places))
    newest = int(time.time()) - DAY
    lines: list[tuple[int, str]] = []
    for i, place in enumerate(places):
        directory = folder / "results" / place
        directory.mkdir(parents=True)
        start = newest - SPAN_S + i * SPAN_S // directories
        records = []
        for number in range(ATTEMPTS_EACH):
            job, began = 2 * i + number // (ATTEMPTS_EACH - 1) + 1, start + number * 7200
            state = "COMPLETED" if number == ATTEMPTS_EACH - 1 else "REQUEUED"
            lines.append((began + 3600, _sacct(folder, place, job, began, state)))
            records += _records(place, number + 1, job, began, state)
        (directory / ATTEMPTS).write_text("".join(json.dumps(r) + "\n" for r in records))
    with open(folder / "all.txt", "w") as whole, open(folder / "newest.txt", "w") as recent:
        for end, line in lines:
            whole.write(line)
            if end > newest - 3 * DAY:
                recent.write(line)
    stand_in = folder / "bin" / "sacct"
    stand_in.parent.mkdir()
    which = (
        f'case "$*" in *--starttime=1970*) cat {folder}/all.txt;; *) cat {folder}/newest.txt;; esac'
    )
    stand_in.write_text(f"#!/bin/sh\n{which}\n")
    (folder / "bin" / "squeue").write_text("#!/bin/sh\n")
    for path in stand_in.parent.iterdir():
        path.chmod(0o755)


def _sacct(folder: Path, place: str, job: int, began: int, state: str) -> str:
    """One line in the order of `abf.cluster.history`'s fields."""
    from abf.cluster.history import _FIELDS
    from abf.cluster.slurm import SEPARATOR

    stage, _, key = place.partition("/")
    tres = "billing=128,cpu=128,energy=0,gres/gpu=16,mem=1976000M,node=4"
    values = {
        "cluster": "leonardo",
        "job_id": str(job),
        "shown_id": str(job),
        "user": "somebody",
        "name": f"abf-{stage}-{key}-01234567",
        "comment": f"abf {stage} {key}",
        "account": "euhpc_bench",
        "submit": str(began - 60),
        "start": str(began),
        "end": str(began + 3600),
        "elapsed": "3600",
        "limit": "1440",
        "state": state,
        "reason": "None",
        "exit_code": "0:0",
        "tres": tres,
        "requested": tres,
        "energy": "0",
        "workdir": str(folder),
    }
    return SEPARATOR.join(values[name] for name in _FIELDS) + "\n"


def _records(place: str, number: int, job: int, began: int, state: str) -> list[dict[str, object]]:
    opened: dict[str, object] = {
        "attempt": number,
        "job_id": str(job),
        "host": "lrdn0001",
        "pid": 1234,
        "pid_start": float(began),
        "rule": "train",
        "run": place.partition("/")[2],
        "cores": 8,
        "gpus": 16,
        "start": began + 5.0,
        "state": "RUNNING",
    }
    ended = "COMPLETED" if state == "COMPLETED" else "INTERRUPTED"
    closing = {"state": ended, "reason": "", "end": began + 3595.0, "elapsed_s": 3590.0}
    meter = {"energy_j": 1.5e8, "energy_source": "nvml", "core_seconds": 3000.0}
    return [opened, opened | closing | meter]


def _build(folder: Path, out: str, attempts: int) -> dict[str, float]:
    root = Path(__file__).resolve().parents[1]
    path = f"{folder / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(folder / out)],
        cwd=folder,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        check=True,
    )
    counts = json.loads(done.stdout)
    assert counts["attempts"] == attempts, counts
    assert abs(counts["node_hours"] - 4 * attempts) < 1e-3, counts
    return counts
