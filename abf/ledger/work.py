"""What is left to do in planned stage directories, and what finished ones have cost.

Everything is read from files: plan, `config.json`, manifests, checkpoints; node-hours come from the
scheduler's records. What was computed without a scheduler says nothing about its nodes.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from abf.artifacts import PlanDocument
from abf.files import read_if_json
from abf.ledger.budget import Used
from abf.ledger.forecast import Measurement, Planned, training_parameters
from abf.stages import CONFIG, FREE, MANIFEST, STAGES
from abf.track.pace import checkpointed_step

Read = Callable[[str, str], dict[str, Any] | None]
"""JSON of a file in a stage directory: place, name below it; none where there is no file."""


def reader(results: Path) -> Read:
    """Files of stage directories, each read once."""

    @functools.cache
    def read(place: str, name: str) -> dict[str, Any] | None:
        return read_if_json(results / place / name)

    return read


def work_left(places: Iterable[str], used: Used, results: Path) -> list[Planned]:
    """Unfinished directories that cost node-hours, less what their checkpoints hold."""
    read, left = reader(results), []
    for place in dict.fromkeys(places):
        config = read(place, CONFIG)
        if config is None or not _costs(place, config) or finished(place, read):
            continue
        committed = used.of([place])[1]
        training = training_of(place, config)
        if training is None:
            left.append(Planned(place, _kind(place), committed_node_hours=committed))
            continue
        size = parameters_of(place, read)
        done = _checkpointed_tokens(place, training, read, results)
        tokens = max(training["tokens"] - done, 0)
        work = tokens * (size or 1.0)
        left.append(Planned(place, _kind(place, training), work, size, committed))
    return left


def work_done(used: Used, results: Path) -> list[Measurement]:
    """Finished directories, planned still or not, for which the scheduler billed something."""
    read, done = reader(results), []
    # Checkpoints go while this looks: a walk passes over folders that are gone.
    walks = (os.walk(results / stage) for stage in STAGES)
    found = (Path(folder) for walk in walks for folder, _, files in walk if CONFIG in files)
    for place in sorted(path.relative_to(results).as_posix() for path in found):
        config = read(place, CONFIG)
        spent = used.of([place])[0]
        if config is None or not spent or not finished(place, read):
            continue
        training = training_of(place, config)
        if training is None:
            done.append(Measurement(_kind(place), spent * 3600))
            continue
        size, manifest = parameters_of(place, read), manifest_of(place, read) or {}
        tokens = manifest.get("counts", {}).get("tokens", training["tokens"])
        if size:
            kind = _kind(place, training)
            done.append(Measurement(kind, spent * 3600, tokens * size, size))
    return done


def calibration_cells(
    plan: PlanDocument, unmeasured: Iterable[Planned], results: Path
) -> list[tuple[str, str]]:
    """Name and score directory of the cheapest cells that measure what is unmeasured."""
    smallest: dict[str, Planned] = {}
    for piece in sorted(unmeasured, key=lambda p: (p.work, p.place)):
        smallest.setdefault(piece.kind, piece)
    read = reader(results)
    chosen: dict[str, str] = {}
    # Trainings first: what else is unmeasured mostly lies on the way to their cell's score.
    for piece in sorted(smallest.values(), key=lambda p: _stage(p.place) != "train"):
        above = [(cell, _above(cell["score"], read)) for cell in plan["cells"]]
        holding = [(cell, all_) for cell, all_ in above if piece.place in all_]
        if not any(cell["name"] in chosen for cell, _ in holding) and holding:
            chosen[holding[0][0]["name"]] = holding[0][0]["score"]
    return list(chosen.items())


def _above(place: str, read: Read) -> set[str]:
    found, todo = {place}, [place]
    while todo:
        for inputs in ((read(todo.pop(), CONFIG) or {}).get("inputs") or {}).values():
            for other in [inputs] if isinstance(inputs, str) else inputs:
                if other not in found:
                    found.add(other)
                    todo.append(other)
    return found


def _stage(place: str) -> str:
    return place.partition("/")[0]


def _kind(place: str, training: Mapping[str, Any] | None = None) -> str:
    stage = _stage(place)
    return stage if training is None else f"{stage} {training['objective']['kind']}"


def _costs(place: str, config: Mapping[str, Any]) -> bool:
    imported = config["config"].get("base", {}).get("kind") == "import"
    return _stage(place) not in FREE and not imported


def manifest_of(place: str, read: Read) -> dict[str, Any] | None:
    """Manifest of a finished directory, declared or not."""
    return read(place, f".done/{MANIFEST}") or read(place, MANIFEST)


def finished(place: str, read: Read) -> bool:
    """Whether a directory is finished, by the present version of its stage."""
    manifest = manifest_of(place, read)
    return manifest is not None and manifest["stage_version"] == STAGES[_stage(place)].version


def training_of(place: str, config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Its TrainConfig, if the directory is one of a training; an imported base is none."""
    settings = config["config"]
    match _stage(place):
        case "base":
            return settings.get("base", {}).get("train")
        case "train":
            return settings.get("train")
    return None


def parameters_of(place: str, read: Read) -> float | None:
    """Parameters of the trained model; none while an imported base, or a settings file, is lost."""
    base: str | None = place
    if _stage(place) == "train":
        base = _input(_input(place, "init", read), "base", read)
    if base is None:
        return None
    manifest = manifest_of(base, read)
    if manifest is not None and "parameters" in manifest["counts"]:
        return float(manifest["counts"]["parameters"])
    packed = _input(base, "packed", read)  # of what is imported there is none
    tokenizer = _input(packed, "tokenizer", read)
    if packed is None or tokenizer is None:
        return None
    settings, packing, words = (read(p, CONFIG) for p in (base, packed, tokenizer))
    if settings is None or packing is None or words is None:
        return None
    return float(
        training_parameters(
            settings["config"]["base"]["shape"],
            vocabulary=words["config"]["tokenizer"]["vocab_size"],
            longest_block=packing["config"]["pack"]["max_block"],
        )
    )


def _input(place: str | None, name: str, read: Read) -> str | None:
    """The input of that name of a planned directory; none where that is not known."""
    document = read(place, CONFIG) if place else None
    return document["inputs"].get(name) if document else None


def _checkpointed_tokens(place: str, training: Mapping[str, Any], read: Read, results: Path) -> int:
    """Clean tokens that the newest checkpoint has seen."""
    packed = (read(place, CONFIG) or {})["inputs"]["packed"]
    rows = (read(packed, CONFIG) or {})["config"]["pack"]["row_length"]
    return checkpointed_step(results / place) * training["batch_rows"] * rows
