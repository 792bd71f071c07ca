"""What a driver costs while it waits on many jobs, measured on the box.

    python -m tests.slurm.driver_cost [--cells 50] [--seconds 300]

A grid's trainings wait in the queue behind other work; `snakemake --profile leonardo` and its
waiting rules wait for them as they would for days. Counted are processor seconds of the driver and
everything it started, after start-up, and calls of squeue, sacct and scontrol. Times in seconds.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from tests.slurm.box import Box
from tests.slurm.daemons import wait_for
from tests.slurm.jobs import submit, wait_state
from tests.slurm.micro import RUN, prepare
from tests.slurm.owner import Owner
from tests.workflow.conftest import ROOT

COMMANDS = ("squeue", "sacct", "scontrol")


def counting(folder: Path) -> Path:
    """A folder of commands that note their calls, then are the real ones."""
    calls = folder / "calls"
    calls.touch()
    for name in COMMANDS:
        script = folder / name
        script.write_text(
            f'#!/bin/sh\necho "$(date +%s.%N) {name}" >> {calls}\nexec {shutil.which(name)} "$@"\n'
        )
        script.chmod(0o755)
    return calls


def processor_seconds(process: psutil.Process) -> float:
    """Of a process and all its living descendants, with what their ended children used."""
    total = 0.0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += sum(one.cpu_times()[:4])
        except psutil.NoSuchProcess:
            continue
    return total


def measure(box: Box, folder: Path, *, cells: int, seconds: float) -> str:
    """One line of figures."""
    study = prepare(folder / "study", box)
    (study.folder / "site.yaml").write_text("account: euhpc_test\n")  # the waits of Leonardo
    (study.folder / "run.yaml").write_text(RUN)
    (study.folder / "grid.yaml").write_text(
        f"study: micro\nbase: run.yaml\narms: {{sentence: {{}}}}\nseeds: {list(range(cells))}\n"
    )
    (folder / "bin").mkdir()
    calls = counting(folder / "bin")
    filler = submit(box, "sleep 3000", "--nodes=4", "--exclusive", "--mem=0", "--time=60")
    wait_state(box, filler, "RUNNING")
    tools = [str(folder / "bin"), str(Path(sys.executable).parent)]
    path = os.pathsep.join([*tools, os.environ["PATH"]])
    began = time.monotonic()
    driver = subprocess.Popen(
        [
            *("snakemake", "-s", str(ROOT / "workflow" / "Snakefile")),
            *("--profile", str(ROOT / "profiles" / "leonardo"), "--config", "study=grid.yaml"),
        ],
        cwd=study.folder, env=study.env | {"PATH": path}, start_new_session=True,
        stdout=(folder / "driver.log").open("w"), stderr=subprocess.STDOUT,
    )  # fmt: skip
    try:

        def waiting() -> bool:
            text = box.run("squeue", "--noheader", "--states=PENDING", "--format=%k").stdout
            return text.count("abf train") == cells

        wait_for(f"{cells} waiting jobs", waiting, seconds=900, every=2, process=driver,
                 log=folder / "driver.log")  # fmt: skip
        start_up = time.monotonic() - began
        time.sleep(60)  # the first looks
        process = psutil.Process(driver.pid)
        before, since = processor_seconds(process), time.time()
        time.sleep(seconds)
        used = processor_seconds(process) - before
        made = [line for line in calls.read_text().splitlines() if float(line.split()[0]) >= since]
        count = {name: sum(line.endswith(name) for line in made) for name in COMMANDS}
        return (
            f"{cells} waiting jobs, {seconds:.0f} s: {used * 3600 / seconds:.1f} processor seconds "
            f"an hour; calls in 30 s: "
            + ", ".join(f"{name} {n * 30 / seconds:.2f}" for name, n in count.items())
            + f"; start-up until the last job was submitted {start_up:.0f} s"
        )
    finally:
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()


def main() -> None:
    """Measure, print, end the box."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", type=int, default=50)
    parser.add_argument("--seconds", type=float, default=300)
    args = parser.parse_args()
    owner = Owner()
    try:
        box = Box(owner.root)
        box.up()
        with tempfile.TemporaryDirectory() as folder:
            (Path(folder) / "study").mkdir()
            print(measure(box, Path(folder), cells=args.cells, seconds=args.seconds), flush=True)
    finally:
        owner.release()


if __name__ == "__main__":
    main()
