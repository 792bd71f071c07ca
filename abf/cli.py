"""`abf STAGE DIRECTORY`: one command per rule; whatever a rule does, a person can type.

A stage directory's `config.json` (written by `abf plan` or by Snakemake) says what the stage reads:
its settings and its input directories. `abf STAGE --help` says what each stage does.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from abf.commands import STAGE_COMMANDS, run_stage
from abf.errors import AbfError, ArtifactError, ConfigError, Interrupted, os_fault
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


def _stop(number: int, _frame: Any) -> NoReturn:
    raise Interrupted(f"stopped by {signal.Signals(number).name}; nothing half-written was kept")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="abf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

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
        sub = command(name, f"{text}\n\nWrites: {payload}.", f"abf {name} results/{name}/KEY")
        sub.add_argument("directory", type=Path, help=f"results/{name}/KEY (or its manifest.json)")
        if name in TRAINED:
            sub.add_argument(
                "--submit", action="store_true", help="as a Slurm job; attaches to one that lives"
            )
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
    return parser


def _drive(arguments: argparse.Namespace) -> int:
    from abf.drive import Drive

    drive = Drive(arguments.results)
    if arguments.action == "start":
        if arguments.study is None:
            raise ConfigError("name the study: abf drive start STUDY.yaml")
        job = drive.start(arguments.study, arguments.profile)
        print(f"driver submitted as job {job}; `abf drive follow` shows its log {drive.log}")
    elif arguments.action == "status":
        print(drive.status())
    elif arguments.action == "follow":
        drive.follow()
    elif arguments.action == "stop":
        print(f"driver job {drive.stop()} ended; trainings go on until somebody cancels them")
    else:
        return drive.run()
    return 0


def _run(arguments: argparse.Namespace) -> int:
    command = arguments.command
    if command in STAGE_COMMANDS and getattr(arguments, "submit", False):
        from abf.launch import launch

        launch(command, arguments.directory)
    elif command in STAGE_COMMANDS:
        run_stage(command, arguments.directory)
    elif command == "plan":
        from abf.study import print_plan

        print_plan(arguments.study, arguments.results)
    elif command == "config":
        from abf.grid import load_study
        from abf.reference import check_reference, write_reference

        if not arguments.files and not arguments.write and not arguments.check:
            raise ConfigError("give YAML files to check, --write FOLDER, or --check FOLDER")
        for file in arguments.files:
            study = load_study(file)
            print(f"{file}: {len(study.cells)} cell(s), all valid")
        if arguments.write:
            write_reference(arguments.write)
        if arguments.check:
            check_reference(arguments.check)
    elif command == "link-profile":
        from abf.profile import link_profile

        print(link_profile(arguments.name, arguments.profiles, arguments.config_home))
    elif command == "drive":
        return _drive(arguments)
    else:
        from abf.study import serve_ui

        serve_ui(arguments.results, arguments.port)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors a user can act on are one message and a distinct exit code."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(arguments)
    except AbfError as error:
        print(f"abf {arguments.command}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        fault = os_fault(error)
        if fault is None:
            raise
        print(f"abf {arguments.command}: {fault}", file=sys.stderr, flush=True)
        return ArtifactError.exit_code
    except KeyboardInterrupt:
        print(f"abf {arguments.command}: interrupted", file=sys.stderr, flush=True)
        return 130


if __name__ == "__main__":
    sys.exit(main())
