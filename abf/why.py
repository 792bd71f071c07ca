"""`abf why TARGET`: why Snakemake will run a directory or not, in the words of keys and versions.

Nothing is written. A place is `{stage}/{key}`, a directory relative to the results folder.
"""

from __future__ import annotations

import difflib
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from abf.cluster.jobs import job_record
from abf.errors import ConfigError
from abf.files import read_own
from abf.seeing.at_work import job_said
from abf.seeing.differences import Differences, finished_places
from abf.seeing.planned import Planned, read_document, read_planned, slug
from abf.seeing.rerun import Rerun, manifest_path
from abf.stages import STAGES, stage_dir
from abf.track.outcomes import attempt_outcomes

MOST = 6
"""Directories, causes and differing keys that are spelled out; the others are counted."""
NEVER_RUN = "never run"


class Why:
    """Verdicts on directories, in words."""

    def __init__(self, planned: Planned) -> None:
        self.planned, self.results = planned, planned.results
        self.rerun, self.differences = Rerun(planned), Differences(planned)

    def answer(self, places: Sequence[str]) -> list[str]:
        """Verdicts on some directories, those of one verdict and one reason together."""
        alone = len(places) == 1
        # Where several begin what is new, the keys of each would bury the rest.
        begin = [p for p in places if p in self.planned.places and not self.roots(p)]
        begin = [p for p in begin if not self.rerun.standing(p).finished]
        groups: dict[tuple[str, ...], list[str]] = {}
        for place in places:
            keys = alone or begin == [place]
            verdict, *reasons = self.explain(place, keys=keys, when=alone)
            groups.setdefault((verdict.removeprefix(place), *reasons), []).append(place)
        lines = []
        for (verdict, *reasons), here in groups.items():
            lines += [f"{self._named(here)}{verdict}", *reasons]
        if len(begin) > 1 and not alone:
            lines.append(
                "(name one alone to see the nearest finished one and the keys that differ)"
            )
        return lines

    def _named(self, places: Sequence[str]) -> str:
        rest = f" and {len(places) - MOST} more" if len(places) > MOST else ""
        return ", ".join(map(self.planned.name, places[:MOST])) + rest

    def explain(self, place: str, *, keys: bool = True, when: bool = True) -> list[str]:
        """A verdict, and under it the reasons, indented.

        Args:
            keys: for what was never made, the nearest finished directory and the differing keys.
            when: for what was, the time.
        """
        if place not in self.planned.places:
            return self._explain_unplanned(place)
        outcomes = attempt_outcomes(self.results / place)
        if outcomes and outcomes[-1]["state"] == "RUNNING":
            last = outcomes[-1]
            who = f"process {last['pid']} on {last['host']}, job {last['job_id']}"
            return [f"{place} is at work: attempt {last['attempt']}, {who}"]
        standing, wrong = self.rerun.standing(place), self.rerun.damage(place)
        if place not in self.rerun.needed:
            if not standing.declared:
                return [
                    f"{place} will not run: it has no manifest, but nothing that is to run reads it"
                ]
            at = f" {self._when(place)}" if when else ""
            lines = [
                f"{place} will not run: it was finished{at} with the stage version, configuration "
                "and inputs that are asked for now"
            ]
            if wrong:
                lines.append(
                    f"  but {wrong}, which Snakemake does not look at: what reads it will stop; "
                    f"{self._by_hand(place)}"
                )
            return lines
        if not self.rerun.repeats(place):
            return [
                f"{place} will only be declared: its work was finished {self._when(place)} and is "
                "not repeated"
            ]
        return [f"{place} will run", *(f"  {reason}" for reason in self._reasons(place, keys))]

    def roots(self, place: str) -> dict[str, str]:
        """What above a directory starts it all: place -> reason, in pipeline order."""
        found: dict[str, str] = {}
        waiting = set()
        for up in self.planned.places:
            if up not in self.rerun.above(place) or not self.rerun.repeats(up):
                continue
            standing = self.rerun.standing(up)
            if standing.faults:
                found[up] = "; ".join(standing.faults)
            elif not standing.finished:
                found[up] = self._unfinished(up)
                waiting.add(up)
            elif not standing.declared and (wrong := self.rerun.damage(up)):
                found[up] = wrong
        # What never ran because of another root is none itself.
        later = {up for up in waiting if self.rerun.above(up) & found.keys()}
        return {up: reason for up, reason in found.items() if up not in later}

    def _reasons(self, place: str, keys: bool) -> Iterator[str]:
        standing, roots = self.rerun.standing(place), self.roots(place)
        if not standing.finished:
            own = self._unfinished(place)
            # What waits for others has not run: their reason says it.
            if own != NEVER_RUN or not roots:
                yield own
        yield from standing.faults
        if standing.finished and not standing.declared and (wrong := self.rerun.damage(place)):
            yield wrong
        stage = STAGES[place.partition("/")[0]]
        if standing.finished and not standing.faults and not roots and not stage.pure:
            yield "what it reads is declared again, and it reads more than its inputs"
        causes: dict[str, list[str]] = {}
        for up, reason in roots.items():
            causes.setdefault(reason, []).append(up)
        for reason, ups in list(causes.items())[:MOST]:
            yield f"because of {self._named(ups)}: {reason}"
        if rest := sum(map(len, list(causes.values())[MOST:])):
            yield f"and because of {rest} more above it"
        yield from self._obstacles(place)
        if keys and not standing.finished:
            yield from self._nearest(place)

    def _obstacles(self, place: str) -> Iterator[str]:
        """Inputs that will stop it, and that Snakemake will not make first."""
        for up in self.rerun.inputs(place):
            if self.rerun.repeats(up):
                continue
            fault = (
                self.rerun.damage(up) if self.rerun.standing(up).finished else "it has no manifest"
            )
            if fault is not None:
                yield (
                    f"and will stop at its input {up}: {fault}, and Snakemake does not make it "
                    f"again by itself; {self._by_hand(up)}"
                )

    def _by_hand(self, place: str) -> str:
        directory = shlex.quote(str(self.results / place))
        return f"`abf {place.partition('/')[0]} {directory}` makes it again"

    def _unfinished(self, place: str) -> str:
        """Where an unfinished directory stands."""
        directory = self.results / place
        outcomes = attempt_outcomes(directory)
        last = outcomes[-1] if outcomes else None
        said = job_said(directory, job_record(directory), last)
        if not said and last is None:
            return NEVER_RUN
        if not said and last is not None:
            reason = f": {last['reason']}" if last["reason"] else ""
            said = f"attempt {last['attempt']} was {last['state']}{reason}"
        steps = sorted((directory / "ckpt").glob("step-*"))
        return said + (f"; it goes on from {steps[-1].name}" if steps else "")

    def _nearest(self, place: str) -> Iterator[str]:
        others = finished_places(self.results, place.partition("/")[0])
        found = self.differences.nearest(place, others)
        if found is None:
            return
        other, keys = found
        name = self.planned.name(other)
        yield f"nearest finished one: {name}, with other keys (there -> here)"
        yield from _cut([f"  {key}" for key in keys])

    def _explain_unplanned(self, place: str) -> list[str]:
        by = self.planned.study or f"any plan in {self.results / 'plan'}"
        standing = self.rerun.standing(place)
        state = f"finished {self._when(place)}" if standing.finished else self._unfinished(place)
        lines = [f"{place} will not run: it is not planned by {by} ({state})"]
        stage = place.partition("/")[0]
        planned = [p for p in self.planned.places if p.partition("/")[0] == stage]
        if (found := self.differences.nearest(place, planned)) is not None:
            other, keys = found
            lines.append(f"  nearest planned one: {other}, with other keys (there -> here)")
            lines += _cut([f"    {key}" for key in keys])
        return lines

    def _when(self, place: str) -> str:
        path = manifest_path(self.results / place)
        assert path is not None, place
        made = read_own(path)
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(made["started"] + made["seconds"]))

    # --- targets ---------------------------------------------------------------------------

    def find(self, target: str) -> list[str]:
        """Places that a target names: a path, a place, a stage, a cell, or a key without hashes.

        Raises:
            ConfigError: it names nothing; lists what comes near.
        """
        path = stage_dir(target)
        for below in (self._below(path), path.as_posix()):
            if below in self.planned.places or self._is_directory(below):
                return [below]
        places = self.planned.places
        if target in STAGES:
            return [place for place in places if place.partition("/")[0] == target]
        for plan in self.planned.plans:
            for cell in plan["cells"]:
                if cell["name"] == target:
                    return [cell["train"], *cell["decodes"].values(), cell["score"]]
        keys = [p for p in places if target in (key := p.partition("/")[2], slug(key), slug(p))]
        if keys:
            return keys
        cells = [cell["name"] for plan in self.planned.plans for cell in plan["cells"]]
        near = difflib.get_close_matches(target, [*places, *cells, *STAGES], n=3, cutoff=0.5)
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(
            f"{target!r} is no directory of {self.results}, no stage, and no cell of what is "
            f"planned{hint}. Cells: {', '.join(cells[:MOST])}{' …' if len(cells) > MOST else ''}"
        )

    def _below(self, path: Path) -> str:
        """A path from the results folder; one that is not in it has `..`."""
        return Path(
            os.path.relpath(os.path.realpath(path), os.path.realpath(self.results))
        ).as_posix()

    def _is_directory(self, place: str) -> bool:
        """Whether it is a stage directory that some plan once asked for."""
        stage, _, key = place.partition("/")
        return stage in STAGES and bool(key) and read_document(self.results / place) is not None


def show_why(target: str, results: Path, study: Path | None) -> None:
    """Print why each directory that `target` names will run or not.

    Raises:
        ConfigError: the study is faulty, or the target names nothing.
    """
    planned = read_planned(results, study)
    if not planned.plans:
        raise ConfigError(f"{results} holds no plan: name the study file, abf why {target} STUDY")
    why = Why(planned)
    print("\n".join(why.answer(why.find(target))))
    if study is None:
        print("(by the plans on disk; name the study file to see what it asks for now)")


def _cut(lines: list[str]) -> list[str]:
    rest = len(lines) - MOST
    return [*lines[:MOST], f"    and {rest} more"] if rest > 0 else lines
