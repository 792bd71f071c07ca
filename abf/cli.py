"""`abf STAGE DIRECTORY`: one command per rule; whatever a rule does, a person can type.

A stage directory's `config.json` (written by `abf plan` or by Snakemake) says what the stage reads:
its settings and its input directories. `abf STAGE --help` says what each stage does.
"""

from __future__ import annotations

import argparse
import errno
import signal
import sys
from pathlib import Path
from typing import Any, NoReturn

from abf.commands import STAGE_COMMANDS, run_stage
from abf.errors import AbfError, ArtifactError, ConfigError, Interrupted
from abf.stages import STAGES


def _stop(number: int, _frame: Any) -> NoReturn:
    raise Interrupted(f"stopped by {signal.Signals(number).name}; nothing half-written was kept")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="abf", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, function in STAGE_COMMANDS.items():
        text = (function.__doc__ or "").strip()
        payload = ", ".join(STAGES[name].payload)
        sub = commands.add_parser(name, help=text, description=f"{text} Writes: {payload}.")
        sub.add_argument("directory", type=Path, help=f"results/{name}/KEY (or its manifest.json)")
    sub = commands.add_parser("plan", help="Check a study, write its plan, and list what is done.")
    sub.add_argument("study", type=Path, help="grid or run YAML")
    sub.add_argument("--results", type=Path, default=Path("results"), help="results folder")
    sub = commands.add_parser("config", help="Check run or grid files, or rewrite the reference.")
    sub.add_argument("files", type=Path, nargs="*", help="YAML files to check")
    sub.add_argument("--write", type=Path, metavar="FOLDER", help="write config.yaml, schema.json")
    sub.add_argument("--check", type=Path, metavar="FOLDER", help="fail if those are out of date")
    sub = commands.add_parser("ui", help="Ingest what exists and serve the MLflow UI on loopback.")
    sub.add_argument("--results", type=Path, default=Path("results"), help="results folder")
    sub.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1; 0 takes a free one")
    sub = commands.add_parser("link-profile", help="Let `snakemake --profile NAME` find it.")
    sub.add_argument("name", help="folder below profiles/")
    sub.add_argument("--profiles", type=Path, default=Path("profiles"), help="folder of profiles")
    sub.add_argument("--config-home", type=Path, required=True, help="usually ~/.config")
    return parser


def _run(arguments: argparse.Namespace) -> None:
    command = arguments.command
    if command in STAGE_COMMANDS:
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
    else:
        from abf.study import serve_ui

        serve_ui(arguments.results, arguments.port)


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors a user can act on are one message and a distinct exit code."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        _run(arguments)
    except AbfError as error:
        print(f"abf {arguments.command}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" while writing {error.filename}" if error.filename else ""
        print(
            f"abf {arguments.command}: disk full{where}; nothing half-written was kept: free space "
            "and run the same command again",
            file=sys.stderr,
            flush=True,
        )
        return ArtifactError.exit_code
    except KeyboardInterrupt:
        print(f"abf {arguments.command}: interrupted", file=sys.stderr, flush=True)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
