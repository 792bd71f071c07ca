"""`abf STAGE DIRECTORY`: one command per rule; whatever a rule does, a person can type.

A stage directory's `config.json` (written by `abf plan` or by Snakemake) says what the stage reads:
its settings and its input directories. `abf STAGE --help` says what each stage does.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from typing import Any, NoReturn

from abf.arguments import TRAINED, parser
from abf.commands import STAGE_COMMANDS, follow_stage, run_stage
from abf.errors import AbfError, ArtifactError, ConfigError, Interrupted, os_fault


def _stop(number: int, _frame: Any) -> NoReturn:
    raise Interrupted(f"stopped by {signal.Signals(number).name}; nothing half-written was kept")


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

        launch(command, arguments.directory, accept=arguments.accept)
    elif command == "report" and arguments.so_far:
        from abf.so_far import write_so_far

        write_so_far(arguments.directory)
    elif command in TRAINED:
        # torchrun starts the same command on every rank.
        first = int(os.environ.get("RANK", "0")) == 0
        (run_stage if first else follow_stage)(
            command, arguments.directory, accept=arguments.accept
        )
    elif command in STAGE_COMMANDS:
        run_stage(command, arguments.directory)
    elif command == "plan":
        from abf.study import print_plan

        print_plan(arguments.study, arguments.results)
    elif command == "config":
        from abf.grid import load_study
        from abf.outside import check_outside
        from abf.reference import check_reference, write_reference

        if not arguments.files and not arguments.write and not arguments.check:
            raise ConfigError("give YAML files to check, --write FOLDER, or --check FOLDER")
        for file in arguments.files:
            study = load_study(file)
            check_outside(study)
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
    elif command == "audit":
        from abf.audit import show_audit

        show_audit(
            arguments.log, arguments.model, arguments.steps,
            html=arguments.html, request=arguments.request, tokenizer=arguments.tokenizer,
        )  # fmt: skip
    elif command == "budget":
        from abf.budget import show_budget

        show_budget(arguments.results, arguments.study, arguments.plot)
    elif command == "status":
        from abf.status import show_status

        show_status(arguments.results, arguments.study)
    elif command == "why":
        from abf.why import show_why

        show_why(arguments.target, arguments.results, arguments.study)
    elif command == "keep":
        from abf.keep import keep

        keep(arguments.results, arguments.study, back=arguments.restore)
    elif command == "gc":
        from abf.gc import collect

        collect(arguments.results, arguments.study, yes=arguments.yes)
    elif command == "doctor":
        from abf.doctor import doctor

        healthy = doctor(arguments.results, arguments.study, arguments.profile, job=arguments.job)
        return 0 if healthy else 1
    else:
        from abf.study import serve_ui

        serve_ui(arguments.results, arguments.port)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point; errors a user can act on are one message and a distinct exit code."""
    arguments = parser(__doc__).parse_args(argv)
    signal.signal(signal.SIGTERM, _stop)
    try:
        return _run(arguments)
    except AbfError as error:
        print(f"abf {arguments.command}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:  # `abf ... | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE  # as any command that was not read to its end
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
