"""Which planned directories Snakemake would run, and which of them would repeat their work.

The order of things is Snakemake's: what was made with another stage version, configuration or
input, or before a file from outside changed, is made again with everything after it; what is
missing is made only when something that is to run reads it. Work that is finished but not declared
is declared and not repeated (`abf.stage.is_finished`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from abf.artifacts import damage
from abf.files import read_own, sha256
from abf.instance import outside_files
from abf.seeing.differences import changed_inputs, changed_keys
from abf.seeing.planned import Document, Planned, inputs_of
from abf.stage import DONE, content_hash
from abf.stages import CONFIG, MANIFEST, STAGES


@dataclass(frozen=True)
class Standing:
    """What a directory holds, held against what is asked of it."""

    finished: bool
    """It has a manifest, declared or not."""
    declared: bool
    """The manifest has the name that Snakemake looks for."""
    faults: tuple[str, ...]
    """Why what was finished is not what is asked for now."""
    alike: bool = False
    """An input was made again since, with the content it had: to be declared again, not done."""


class Rerun:
    """What Snakemake will do about each directory of a plan."""

    def __init__(self, planned: Planned) -> None:
        self.planned, self.results = planned, planned.results
        self._standings: dict[str, Standing] = {}
        self._repeats: dict[str, bool] = {}
        self._inputs: dict[str, tuple[str, str, int] | None] = {}

    # --- what each directory holds ---------------------------------------------------------

    def standing(self, place: str) -> Standing:
        """What a directory holds, held against what is asked of it."""
        known = self._standings.get(place)
        if known is None:
            directory, document = self.results / place, self.planned.document(place)
            path = manifest_path(directory)
            faults: tuple[str, ...] = ()
            alike = False
            if path is not None and document is not None:
                manifest = read_own(path)
                faults = tuple(self._faults(directory, document, manifest, path))
                alike = any(self._is_newer(p, e, path) for p, e in _read_inputs(document, manifest))
            declared = (directory / MANIFEST).exists()
            known = self._standings[place] = Standing(path is not None, declared, faults, alike)
        return known

    def _faults(
        self, directory: Path, document: Document, manifest: Mapping[str, Any], path: Path
    ) -> Iterator[str]:
        name = document["stage"]
        if (before := manifest["stage_version"]) != STAGES[name].version:
            yield f"version of stage {name}: {before} -> {STAGES[name].version}"
        yield from _config_faults(directory, document, manifest)
        for place, entry in _read_inputs(document, manifest):
            if self._is_other(place, entry):
                yield f"input {place} was made again after it was read"
        made = path.stat().st_mtime
        for file in outside_files(document["stage"], document["config"]):
            if not file.exists():
                yield f"file {file} from outside is gone"
            elif file.stat().st_mtime > made:
                yield f"file {file} from outside was written after it was read"

    def _input(self, place: str) -> tuple[str, str, int] | None:
        """Hash of an input's manifest, of its content, and when it was declared."""
        if place not in self._inputs:
            path = manifest_path(self.results / place)
            self._inputs[place] = None
            if path is not None:
                content = content_hash(read_own(path))
                self._inputs[place] = sha256(path), content, path.stat().st_mtime_ns
        return self._inputs[place]

    def _is_other(self, place: str, entry: Mapping[str, str]) -> bool:
        """Whether an input has another content than it was read with."""
        now = self._input(place)
        return now is not None and entry["sha256"] != now[0] and entry.get("content") != now[1]

    def _is_newer(self, place: str, entry: Mapping[str, str], made: Path) -> bool:
        now = self._input(place)
        return now is not None and entry["sha256"] != now[0] and now[2] > made.stat().st_mtime_ns

    # --- what will run ---------------------------------------------------------------------

    @cached_property
    def needed(self) -> frozenset[str]:
        """Planned directories that Snakemake would start a rule for."""
        reads = {place: self._waits_for(place) for place in self.planned.places}
        read_by: dict[str, list[str]] = {place: [] for place in reads}
        for place, ups in reads.items():
            for up in ups:
                read_by.setdefault(up, []).append(place)
        first = []
        for place in reads:
            standing = self.standing(place)
            missing = place in self.planned.targets and not standing.declared
            if missing or (standing.declared and (standing.faults or standing.alike)):
                first.append(place)
        found, queue = set(first), deque(first)
        while queue:
            place = queue.popleft()
            missing_inputs = [p for p in reads.get(place, ()) if not self.standing(p).declared]
            for other in [*missing_inputs, *read_by[place]]:
                if other not in found:
                    found.add(other)
                    queue.append(other)
        return frozenset(found)

    def inputs(self, place: str) -> list[str]:
        """What a directory reads."""
        document = self.planned.document(place)
        return [] if document is None else [p for ups in inputs_of(document).values() for p in ups]

    def _waits_for(self, place: str) -> list[str]:
        """Inputs that Snakemake knows of: those that another input is made from are left out."""
        direct = self.inputs(place)
        implied = {above for up in direct for above in self.above(up)}
        return [up for up in direct if up not in implied]

    @cached_property
    def _ancestors(self) -> dict[str, frozenset[str]]:
        return {}

    def above(self, place: str) -> frozenset[str]:
        """Everything a directory is made from."""
        known = self._ancestors.get(place)
        if known is None:
            found: set[str] = set()
            for up in self.inputs(place):
                found |= self.above(up) | {up}
            known = self._ancestors[place] = frozenset(found)
        return known

    def repeats(self, place: str) -> bool:
        """Whether its rule would do the work, not only declare finished work again."""
        known = self._repeats.get(place)
        if known is None:
            standing = self.standing(place)
            known = self._repeats[place] = place in self.needed and (
                not standing.finished
                or not STAGES[place.partition("/")[0]].pure
                or bool(standing.faults)
                or (not standing.declared and self.damage(place) is not None)
                or any(self.repeats(up) for up in self.inputs(place))
            )
        return known

    def damage(self, place: str) -> str | None:
        """What is wrong with the payload that a manifest lists; None if nothing is."""
        directory = self.results / place
        path = manifest_path(directory)
        return None if path is None else damage(directory, read_own(path))


def manifest_path(directory: Path) -> Path | None:
    """The manifest, declared or not."""
    for path in (directory / MANIFEST, directory / DONE / MANIFEST):
        if path.exists():
            return path
    return None


def _read_inputs(
    document: Document, manifest: Mapping[str, Any]
) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Input places with what the manifest says of them, less lists that were others then."""
    for label, places in inputs_of(document).items():
        known = manifest["inputs"].get(label, [])
        if len(known) == len(places):  # else named with the configuration that lists them
            yield from zip(places, known, strict=True)


def _config_faults(
    directory: Path, document: Document, manifest: Mapping[str, Any]
) -> Iterator[str]:
    """Keys and inputs in which the configuration of finished work differs from what is asked."""
    if manifest["config"] is None:
        return
    for path in (directory / DONE / CONFIG, directory / CONFIG):
        if path.exists() and sha256(path) == manifest["config"]:
            before = read_own(path)
            yield from changed_keys(before, document)
            yield from changed_inputs(before, document)
            return
    yield "its configuration changed; with which one it was made is not on record"
