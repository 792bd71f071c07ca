"""What can be typed after `abf`: commands, their arguments and their help."""

from __future__ import annotations

import argparse
from pathlib import Path

from abf.commands import STAGE_COMMANDS
from abf.stages import STAGES

TRAINED = ("base", "train")
"""Stages that a cluster runs as distributed jobs of their own."""

PLAN = """\
Check a study, write its plan, and list what is done.

Writes `config.json` into every stage directory of the study (only where it changes) and prints each
directory with its state and its attempts. Nothing is computed."""
CONFIG = """\
Check run or grid files, or rewrite the reference.

A faulty file is refused with the key path, the value and what is allowed; config/config.yaml lists
every key with its default. --write and --check are for those who change the config classes."""
UI = """\
Ingest what exists and serve the MLflow UI on loopback.

Fills the MLflow store below the results folder from journals, scores and attempts, finished or not,
prints the address of every study, and serves until Ctrl-C."""
LINK = """\
Let `snakemake --profile NAME` find it.

Links profiles/NAME of this checkout into Snakemake's folder of profiles; what is there already is
left alone."""

DRIVE = """\
Run Snakemake on the cluster's serial partition, as a chain of short jobs.

Login nodes end long processes. `start` submits a driver that queues itself again before its time
limit until everything is made or nothing can progress; `status`, `follow` and `stop` look at it.
Ending the driver ends no training: the next one attaches to it."""

DOCTOR = """\
Check account, partition, QOS, budget, disks, versions and data before a job is submitted.

Prints one line a check, OK, WARN or FAIL, with what to do; exits 0 only if nothing failed. With a
study, its trainings and sources are looked at, too. What the scheduler allows is stored in
RESULTS/.driver/limits.json."""

STATUS = """\
One screen about a results folder: what is done, at work, spent, to come, and what failed last.

Counts stage directories by state, lists running and waiting work with job or process, progress and
time left, names the driver, adds up core-hours and node-hours, and ends with the last failure and
the end of its log. Reads files, and asks the scheduler where there is one; changes nothing."""
WHY = """\
Say why a directory will run or not, in the words of config keys and stage versions.

TARGET is a stage directory, its manifest, a stage, a cell of the study, or a key without its hash.
Names the root cause above it, and, for what was never run, the nearest finished directory and the
keys that differ. Changes nothing."""

BUDGET = """\
Node-hours spent, committed and to come, against the allocation and the study's cap.

Counts every attempt of every user of the account since the allocation began, running and queued
jobs to their time limits, and a forecast from what finished directories have cost. With a study,
its plan is written and refused (exit code 9) when it does not fit."""

KEEP = """\
Copy finished directories to the project area, where nothing is purged, or restore them from there.

Copies what a plan names and is finished to STORAGE.WORK/abf-results/NAME (site file), each file
held against its manifest; what is there already is left alone, what was killed goes on. Every
driver does this by itself, and restores what is missing before it begins."""
GC = """\
List what may be deleted, why, and how much it is; delete it with --yes.

Policy. At once: checkpoints of finished trainings, and what dead attempts, copies and deletions
left. After storage.keep_days of the site file (default 60) without a writing: directories that no
plan names, and their kept copies. Never: what is at work, what a plan names and is unfinished, and
the records of attempts and jobs. To give a study up, delete its plan/STUDY.json here and in the
copies."""

AUDIT = """\
Hold the event log of a decode to its rules, and to the model.

Replays the log exactly and checks every invariant and hash; the first bad event is named (exit code
of a bad artifact). With --model, steps spread over the log are forwarded anew from the log alone
and the largest difference to what was logged is printed. A log whose tail was cut is no fault: what
there is of it is checked, and it is called incomplete. --html writes one generation as a page,
block by block and step by step."""

ACCEPT = """\
go on from a checkpoint although this key of its configuration has changed since (the refusal names
it: config.optim.lr, for example); once for each key"""

SO_FAR = """\
of a study that is not finished: its ledger and a page of its finished cells into KEY/so-far, which
names the others and why, and MLflow up to date; a driver that ends with an error does the same"""


def parser(description: str | None) -> argparse.ArgumentParser:
    """The parser of `abf`, so described."""
    found = argparse.ArgumentParser(
        prog="abf", description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = found.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str, *examples: str) -> argparse.ArgumentParser:
        shown = "".join(f"\n  {example}" for example in examples)
        return commands.add_parser(
            name,
            help=text.partition("\n")[0],
            description=text,
            epilog=f"example:{shown}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )

    for name, function in STAGE_COMMANDS.items():
        text = (function.__doc__ or "").strip()
        payload = ", ".join(STAGES[name].payload)
        examples = [f"abf {name} results/{name}/KEY"]
        if name == "report":
            examples.append("abf report results/report/STUDY --so-far")
        sub = command(name, f"{text}\n\nWrites: {payload}.", *examples)
        sub.add_argument("directory", type=Path, help=f"results/{name}/KEY (or its manifest.json)")
        if name in TRAINED:
            sub.add_argument(
                "--submit", action="store_true", help="as a Slurm job; attaches to one that lives"
            )
            sub.add_argument("--accept", action="append", default=[], metavar="KEY", help=ACCEPT)
        if name == "report":
            sub.add_argument("--so-far", action="store_true", help=SO_FAR)
    sub = command(
        "plan", PLAN, "abf plan config/grids/demo.yaml", "abf plan my.yaml --results runs"
    )
    sub.add_argument("study", type=Path, help="grid or run YAML")
    sub.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    sub = command("config", CONFIG, "abf config my.yaml", "abf config --write config")
    sub.add_argument("files", type=Path, nargs="*", help="YAML files to check")
    sub.add_argument("--write", type=Path, metavar="FOLDER", help="write config.yaml, schema.json")
    sub.add_argument("--check", type=Path, metavar="FOLDER", help="fail if those are out of date")
    sub = command("ui", UI, "abf ui", "abf ui --port 0")
    sub.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    sub.add_argument(
        "--port", type=int, default=5000, help="on 127.0.0.1 (default: 5000); 0 takes a free one"
    )
    sub = command("link-profile", LINK, "abf link-profile leonardo --config-home ~/.config")
    sub.add_argument("name", help="folder below profiles/")
    sub.add_argument("--profiles", type=Path, default=Path("profiles"), help="folder of profiles")
    sub.add_argument("--config-home", type=Path, required=True, help="usually ~/.config")
    sub = command(
        "audit",
        AUDIT,
        "abf audit results/decode/KEY/TASK/trace.arrows",
        "abf audit results/decode/KEY/TASK/trace.arrows --model results/train/KEY/model",
        "abf audit trace.arrows --html page.html --request 3 --tokenizer "
        "results/tokenizer/KEY/tokenizer",
    )
    sub.add_argument("log", type=Path, help="trace.arrows of a decode")
    sub.add_argument("--model", type=Path, metavar="DIR", help="the model that decoded")
    sub.add_argument("--steps", type=int, default=32, help="steps forwarded anew (default: 32)")
    sub.add_argument("--html", type=Path, metavar="OUT", help="write a page of one generation")
    sub.add_argument("--request", type=int, default=0, help="its number (default: 0)")
    sub.add_argument("--tokenizer", type=Path, metavar="DIR", help="show text instead of ids")
    sub = command(
        "drive",
        DRIVE,
        "abf drive start config/grids/demo.yaml",
        "abf drive follow",
        "abf drive stop",
    )
    sub.add_argument("action", choices=["start", "status", "follow", "stop", "run"])
    sub.add_argument("study", type=Path, nargs="?", help="grid or run YAML, for `start`")
    sub.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    sub.add_argument("--profile", default="leonardo", help="Snakemake profile (default: leonardo)")
    sub = command(
        "doctor", DOCTOR, "abf doctor", "abf doctor config/grids/demo.yaml", "abf doctor --job"
    )
    sub.add_argument("study", type=Path, nargs="?", help="grid or run YAML")
    sub.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    sub.add_argument("--profile", default="leonardo", help="Snakemake profile (default: leonardo)")
    sub.add_argument("--job", action="store_true", help="also ask a compute node (a short job)")
    sub = command("status", STATUS, "abf status", "abf status config/grids/demo.yaml")
    sub.add_argument("study", type=Path, nargs="?", help="grid or run YAML (default: all planned)")
    sub.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    sub = command(
        "why", WHY, "abf why sentence-s0", "abf why results/train/KEY config/grids/demo.yaml"
    )
    sub.add_argument("target", help="directory, manifest, stage, cell, or key")
    sub.add_argument("study", type=Path, nargs="?", help="grid or run YAML (default: all planned)")
    sub.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    sub = command(
        "budget", BUDGET, "abf budget", "abf budget config/grids/demo.yaml --plot budget.svg"
    )
    sub.add_argument("study", type=Path, nargs="?", help="grid or run YAML (default: all planned)")
    sub.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    sub.add_argument("--plot", type=Path, metavar="FILE.svg", help="write the burn-down as SVG")
    sub = command("keep", KEEP, "abf keep", "abf keep config/grids/demo.yaml --restore")
    sub.add_argument("study", type=Path, nargs="?", help="grid or run YAML (default: all planned)")
    sub.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    sub.add_argument("--restore", action="store_true", help="bring back what is missing")
    sub = command("gc", GC, "abf gc", "abf gc config/grids/demo.yaml --yes")
    sub.add_argument("study", type=Path, nargs="?", help="its directories only (default: all)")
    sub.add_argument("--results", type=Path, default=Path("results"), help="default: results")
    sub.add_argument("--yes", action="store_true", help="delete what is listed")
    return found
