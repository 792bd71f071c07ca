"""`abf status` as one screen of plain text; colours and cut lines only on a terminal."""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from abf.ledger.budget import figure
from abf.seeing.hours import Hours
from abf.seeing.look import STATES, Status, Work, look
from abf.seeing.planned import read_planned
from abf.stages import STAGES

COLOURS = {"done": 32, "running": 36, "waiting": 33, "failed": 31, "to do": 0, "outdated": 35}
"""SGR numbers of a terminal."""
BOLD, DIM = 1, 2
INDENT = " " * 9
"""Of what belongs to the label above it."""
STAGE_WIDTH, STATE_WIDTH = 10, 9
FEWEST_ROWS = 4
"""Jobs that are listed however small the terminal is."""
SILENT_SECONDS = 120
"""A training that recorded nothing for so long is said to be silent."""


class Page:
    """Lines that fit a width; None: as long as they are."""

    def __init__(self, width: int | None, *, colour: bool) -> None:
        self.width, self.colour = width, colour
        self.lines: list[str] = []

    def add(self, text: str, colour: int = 0) -> None:
        """One line, cut to the width, in one colour."""
        if self.width is not None and len(text) > self.width:
            text = text[: self.width - 1] + "…"
        self.lines.append(self.paint(text, colour))

    def paint(self, text: str, colour: int) -> str:
        """Text in a colour, where there are colours."""
        return f"\033[{colour}m{text}\033[0m" if self.colour and colour and text.strip() else text

    def wrapped(self, label: str, parts: Sequence[str]) -> None:
        """Parts separated by semicolons after a label, on as many lines as they need."""
        indent, line = INDENT, f"{label:<9}"
        for number, part in enumerate(parts):
            piece = part + (";" if number + 1 < len(parts) else "")
            full = self.width is not None and len(line) + 1 + len(piece) > self.width
            if full and line.strip() and line.strip() != label:
                self.add(line.rstrip())
                line = indent
            line += piece + " "
        self.add(line.rstrip())


def show_status(results: Path, study: Path | None) -> None:
    """Print one screen about a results folder.

    Raises:
        ConfigError: the study is faulty.
        ArtifactError: an `attempts.jsonl` has a line that is no record.
    """
    planned = read_planned(results, study)
    if not planned.plans:
        print(
            f"{results} holds no study yet: `abf plan STUDY.yaml` writes one, `make demo` runs one"
        )
        return
    terminal = sys.stdout.isatty()
    size = shutil.get_terminal_size()
    page = Page(
        size.columns if terminal else None, colour=terminal and "NO_COLOR" not in os.environ
    )
    print("\n".join(render(look(planned), page, rows=size.lines if terminal else None)))


def render(status: Status, page: Page, *, rows: int | None = None) -> list[str]:
    """The screen's lines.

    Args:
        rows: lines that the terminal has; the list of jobs is cut to what is left; None: all.
    """
    planned = status.planned
    done = sum(state == "done" for state in status.states.values())
    for plan in planned.plans:
        cells = len(plan["cells"])
        page.add(f"{plan['study']}: {cells} cell{'s' * (cells != 1)}, {plan['grid']}", BOLD)
    page.add(f"{done} of {len(status.states)} stage directories done in {planned.results}")
    _table(status, page)
    tail = Page(page.width, colour=page.colour)
    _tail(status, tail)
    room = None if rows is None else max(FEWEST_ROWS, rows - len(page.lines) - len(tail.lines) - 1)
    _work([(planned.name(one.place), one) for one in status.work], page, room)
    return [*page.lines, *tail.lines]


def _table(status: Status, page: Page) -> None:
    counts = {stage: {state: status.count(stage, state) for state in STATES} for stage in STAGES}
    shown = [s for s in STATES if s != "outdated" or "outdated" in status.states.values()]
    if page.width is not None and page.width < STAGE_WIDTH + STATE_WIDTH * len(shown):
        for stage, by_state in counts.items():
            if any(by_state.values()):
                words = [f"{by_state[state]} {state}" for state in shown if by_state[state]]
                page.add(f"{stage:<{STAGE_WIDTH}}{', '.join(words)}")
    else:
        header = "".join(f"{state:>{STATE_WIDTH}}" for state in shown)
        page.add(" " * STAGE_WIDTH + header, BOLD)
        for stage, by_state in counts.items():
            if any(by_state.values()):
                cells = "".join(
                    page.paint(
                        f"{by_state[state] or '·':>{STATE_WIDTH}}",
                        COLOURS[state] if by_state[state] else DIM,
                    )
                    for state in shown
                )
                page.lines.append(f"{stage:<{STAGE_WIDTH}}{cells}")
    if status.undeclared:
        page.add(
            f"{status.undeclared} of the done are not declared yet: the next run does that, and no "
            "more"
        )


def _work(work: Sequence[tuple[str, Work]], page: Page, room: int | None) -> None:
    # Trainings first: they are what one looks for, and the longest.
    order = sorted(work, key=lambda w: (w[1].state != "running", w[1].pace is None, w[0]))
    shown = order if room is None or len(order) <= room else order[: room - 1]
    widest = max((len(name) for name, _ in shown), default=0)
    for name, one in shown:
        page.add(f"{name:<{widest}}  {_describe(one)}", COLOURS[one.state])
    if rest := len(order) - len(shown):
        page.add(f"and {rest} more at work or waiting")


def _describe(work: Work) -> str:
    """What is known of it, the least important last: a narrow terminal cuts there."""
    job, pace = work.job, work.pace
    parts = []
    if job is not None:
        parts.append(f"job {job.job_id} {job.state}")
        if work.state == "waiting" and job.reason:
            parts.append(job.reason)
    else:
        parts.append(work.process or "being submitted")
    if pace is not None:
        parts.append(f"step {pace.step}/{pace.steps} ({100 * pace.step / pace.steps:.0f} %)")
        if pace.left_s is not None:
            parts.append(f"{duration(pace.left_s)} left")
        if pace.silent_s > SILENT_SECONDS:
            parts.append(f"silent for {duration(pace.silent_s)}")
        if pace.tokens_per_s is not None:
            parts.append(f"{pace.tokens_per_s:,.0f} tokens/s")
    elif work.since is not None:
        parts.append(f"for {duration(time.time() - work.since)}")
    if job is not None and work.state == "running" and job.time_left:
        parts.append(f"time limit in {job.time_left}")
    return ", ".join(parts)


def _tail(status: Status, page: Page) -> None:
    page.wrapped("driver", [status.driver])
    page.wrapped("spent", [f"{hours(status.spent)} in {status.attempts} attempts"])
    page.wrapped("to come", list(_to_come(status)))
    for text in status.trouble:
        page.wrapped("trouble", [text])
    failure = status.failure
    if failure is None:
        return
    when = duration(max(0.0, time.time() - failure.when))
    failed = sum(state == "failed" for state in status.states.values())
    name = status.planned.name(failure.place)
    page.add(f"failed   {name}, {when} ago ({failed} failed in all)", COLOURS["failed"])
    reason = failure.reason.splitlines()[0] if failure.reason else "no reason given"
    # Whole: it ends in what to do.
    for line in [reason] if page.width is None else textwrap.wrap(reason, page.width - len(INDENT)):
        page.add(INDENT + line)
    if failure.log is None:
        page.add("         it left no log")
        return
    page.add(f"         the end of {failure.log}:")
    for line in failure.lines:
        page.add(f"         | {line.rstrip()}", DIM)


def _to_come(status: Status) -> Iterator[str]:
    total = sum(status.to_come.values(), Hours())
    if not status.to_come and not status.unmeasured:
        yield "nothing"
        return
    if status.to_come:
        parts = ", ".join(f"{stage} {hours(h)}" for stage, h in status.to_come.items())
        yield f"about {hours(total)}"
        yield parts
    if status.unmeasured:
        yield f"no measurement yet: {', '.join(status.unmeasured)}"


def hours(value: Hours) -> str:
    """Core-hours and node-hours, whichever there are."""
    parts = [
        f"{figure(number)} {unit}"
        for number, unit in ((value.core, "core-hours"), (value.node, "node-hours"))
        if number
    ]
    return " and ".join(parts) or "0 core-hours"


def duration(seconds: float) -> str:
    """`45 s`, `12 min`, `3.5 h`, `2.1 days`."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 100 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"
