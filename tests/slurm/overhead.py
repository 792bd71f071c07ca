"""The tiny study through `--profile leonardo` on the box, against the local profile.

    python -m tests.slurm.overhead [--rounds 1]

The same study with trainings of eight gloo ranks on two nodes, and on this machine as one process.
Scheduler waits are the seconds in which a job waited for its start and none of the study's ran.
Times in seconds.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from datetime import datetime
from itertools import pairwise
from pathlib import Path

from tests.slurm.box import Box
from tests.slurm.owner import Owner
from tests.workflow.conftest import ROOT

STUDY = """
{tiny}
launch: {{nodes: 2, ranks_per_node: 4, minutes: 30}}
"""
SITE = "account: euhpc_test\npoll_seconds: 2\n"
"""Between two looks: Leonardo's 30 s would be measured as work."""


def run(folder: Path, env: Mapping[str, str], *profile: str) -> float:
    """Seconds of the study from an empty folder."""
    text = (ROOT / "config" / "tiny.yaml").read_text().replace("batch_rows: 2", "batch_rows: 8")
    text = text.replace("launch: {ranks_per_node: 2}\n", "")
    (folder / "study.yaml").write_text(STUDY.format(tiny=text))
    command = ["snakemake", "-s", str(ROOT / "workflow" / "Snakefile"), "--profile", *profile]
    began = time.monotonic()
    with open(folder / "log", "w") as log:
        subprocess.run(
            [*command, "--config", "study=study.yaml"],
            cwd=folder, env=env, stdout=log, stderr=subprocess.STDOUT, check=True,
        )  # fmt: skip
    return time.monotonic() - began


def phases(box: Box, folder: Path) -> tuple[float, float, int]:
    """Of the jobs from this folder: seconds in which one ran, seconds in which one waited and none
    ran, and their number; prints each job's."""
    text = box.run(
        "sacct", "--allocations", "--noheader", "--parsable2", "--starttime=1970-01-02",
        "--format=Submit,Start,End,Comment,WorkDir",
    ).stdout  # fmt: skip
    rows = [line.split("|") for line in text.splitlines() if line.endswith(f"|{folder}")]
    times = [[datetime.fromisoformat(field).timestamp() for field in row[:3]] for row in rows]
    edges = sorted({moment for row in times for moment in row})
    for row in rows:
        waited, ran = (datetime.fromisoformat(b) - datetime.fromisoformat(a)
                       for a, b in pairwise(row[:3]))  # fmt: skip
        print(f"  {row[3]:<60.60} {waited.seconds:>4} s waiting {ran.seconds:>4} s", flush=True)
    running = alone = 0.0
    for begin, end in pairwise(edges):
        ran = any(start <= begin and end <= ended for _, start, ended in times)
        waited = any(asked <= begin and end <= start for asked, start, _ in times)
        running += (end - begin) * ran
        alone += (end - begin) * (waited and not ran)
    return running, alone, len(rows)


def main() -> None:
    """Both ways in turn, printed as they come."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=1)
    rounds = parser.parse_args().rounds
    owner = Owner()
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    try:
        box = Box(owner.root)
        box.up()
        for number in range(rounds):
            with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
                (Path(two) / "site.yaml").write_text(SITE)
                env = box.env | {"PATH": path, "OMP_NUM_THREADS": "1"}
                local = run(Path(one), env, str(ROOT / "profiles" / "local"))
                slurm = run(
                    Path(two), env | {"ABF_SITE": f"{two}/site.yaml"},
                    str(ROOT / "profiles" / "leonardo"),
                    "--slurm-init-seconds-before-status-checks", "3", "--latency-wait", "5",
                )  # fmt: skip
                ran, waited, jobs = phases(box, Path(two))
            print(
                f"round {number + 1}: local {local:.0f} s; box {slurm:.0f} s with {jobs} jobs: "
                f"{ran:.0f} s of work, {waited:.0f} s in the queue, {slurm - ran - waited:.0f} s "
                "between jobs and in the driver",
                flush=True,
            )
    finally:
        owner.release()


if __name__ == "__main__":
    main()
