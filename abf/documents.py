"""JSON that this program writes and reads again: what each file must hold, by its name.

A file of another shape (an older version's, edited by hand, cut) is refused where it is read, in
one line, instead of somewhere later. Keys that are not listed here may hold anything.
"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from abf.stages import CONFIG, MANIFEST, STAGES


def _stage(name: str) -> str:
    if name not in STAGES:
        raise ValueError(f"{name!r} is no stage")
    return name


def _place(place: str) -> str:
    _stage(place.partition("/")[0])
    return place


Stage = Annotated[str, AfterValidator(_stage)]
Place = Annotated[str, AfterValidator(_place)]
Seconds = Annotated[float, Field(ge=0, le=1e10)]
"""A time or a span that a calendar has (Unix seconds until the year 2286)."""


class Listed(TypedDict):
    """A file in a manifest, or a directory in the list of what was kept."""

    bytes: int
    sha256: str


class Manifest(TypedDict):
    """`manifest.json` of a stage directory."""

    stage: Stage
    stage_version: int
    config: str | None
    inputs: dict[str, list[dict[str, Any]]]
    files: dict[str, Listed]
    counts: dict[str, Any]
    started: Seconds
    seconds: Seconds


class Config(TypedDict):
    """`config.json` of a stage directory."""

    stage: Stage
    key: str
    config: dict[str, Any]
    inputs: dict[str, Place | list[Place]]


class PlanFile(TypedDict):
    """`plan/{study}.json`."""

    study: str
    stages: list[Place]
    cells: list[dict[str, Any]]


class DriveState(TypedDict):
    """`.driver/drive.json`."""

    job_id: str
    study: str
    command: list[str]
    state: str


class Look(TypedDict):
    """`.driver/jobs.json`."""

    jobs: dict[str, dict[str, Any]]
    trouble: str


class Reserved(TypedDict):
    """What `.driver/budget/reserved.json` holds of a place."""

    node_hours: float
    name: str
    job_id: str | None
    at: float


class Sums(TypedDict):
    """`.driver/budget/used.json`."""

    at: float
    who: str
    spent_node_hours: float
    committed_node_hours: float
    by_comment: dict[str, list[float]]


KINDS: dict[str, Any] = {
    MANIFEST: Manifest,
    CONFIG: Config,
    "places.json": dict[Place, Listed],
    "drive.json": DriveState,
    "jobs.json": Look,
    "reserved.json": dict[Place, Reserved],
    "used.json": Sums,
}


@cache
def _adapter(name: str, folder: str) -> TypeAdapter[Any]:
    return TypeAdapter(PlanFile if folder == "plan" else KINDS.get(name, dict[str, Any]))


def parse_document(path: Path, raw: bytes) -> dict[str, Any]:
    """What a file of this name holds.

    Raises:
        ValueError: it is not JSON, or not of the shape that is written under this name; names the
            first key and its value.
    """
    try:
        value = json.loads(raw)
        _adapter(path.name, path.parent.name).validate_python(value, strict=True)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(map(str, fault["loc"])) or "it"
        shown = "" if fault["type"] == "missing" else f" (value {fault['input']!r:.80})"
        raise ValueError(f"{where}: {fault['msg']}{shown}") from None
    return value
