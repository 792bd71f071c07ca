"""Ablation grids: one YAML names base run, arms, axes and seeds; each cell is a checked RunConfig.

A path such as `train.optim.lr` replaces what stands there (no merging of mappings: what a cell
runs is readable from the base and the grid alone).
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from abf.base import ConfigModel
from abf.config import Name, RunConfig, load, read_yaml, validate
from abf.errors import ConfigError

Overrides = dict[str, Any]


class GridSpec(ConfigModel):
    """An ablation grid."""

    study: Name
    """Name of the study: MLflow experiment, report folder."""
    base: str
    """Run YAML that every cell starts from, relative to the grid file."""
    arms: dict[str, Overrides] = Field(default={"main": {}}, min_length=1)
    """Arm name -> dotted path -> value."""
    axes: dict[str, list[Any]] = {}
    """Dotted path -> values; every combination runs with every arm."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Seeds of training and decoding; the interval over seeds is over these."""
    exclude: tuple[Overrides, ...] = ()
    """Combinations left out: an `arm` and/or axis values that must all match."""


@dataclass(frozen=True)
class Cell:
    """One run of a study."""

    name: str
    config: RunConfig


@dataclass(frozen=True)
class Study:
    """A named set of cells from one YAML file."""

    name: str
    path: Path
    cells: tuple[Cell, ...]


def load_study(path: Path) -> Study:
    """Read a grid file (it has a `base`), or a run file as a study of one cell.

    Raises:
        ConfigError: naming the file, the arm or axis, the key path, and what is allowed.
    """
    raw = read_yaml(path)
    if not isinstance(raw.get("base"), str):
        config = load(path)
        return Study(config.study, path, (Cell(f"{config.arm}-s{config.seed}", config),))
    spec = validate(GridSpec, raw, str(path))
    base = (path.parent / spec.base).resolve()
    document = read_yaml(base)
    cells = []
    for arm, values in _combinations(spec, path):
        changes = {**spec.arms[arm], **values}
        suffix = "".join(f".{key.rpartition('.')[2]}={value}" for key, value in values.items())
        name = f"{arm}{suffix}"
        cell = _apply(document, changes, f"{path}: arm {name!r}")
        for seed in spec.seeds:
            stated = {**cell, "study": spec.study, "arm": name, "seed": seed}
            config = validate(RunConfig, stated, f"{path}: arm {name!r} over {spec.base}")
            cells.append(Cell(f"{name}-s{seed}", config))
    if not cells:
        raise ConfigError(f"{path}: `exclude` leaves no cell")
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"{path}: cells named twice: {', '.join(twice)}; check arms and seeds")
    return Study(spec.study, path, tuple(cells))


def _combinations(spec: GridSpec, path: Path) -> list[tuple[str, Overrides]]:
    known = {"arm", *spec.axes}
    for rule in spec.exclude:
        if unknown := sorted(set(rule) - known):
            raise ConfigError(
                f"{path}: exclude: {', '.join(unknown)} is no axis; allowed: {', '.join(known)}"
            )
    found = []
    for arm in spec.arms:
        for combination in itertools.product(*spec.axes.values()):
            values = dict(zip(spec.axes, combination, strict=True))
            here = {"arm": arm, **values}
            if not any(all(here[k] == v for k, v in rule.items()) for rule in spec.exclude):
                found.append((arm, values))
    return found


def _apply(document: Mapping[str, Any], changes: Overrides, origin: str) -> dict[str, Any]:
    """A deep copy of the document with each dotted path set to its value."""
    result = copy.deepcopy(dict(document))
    for path, value in changes.items():
        *parents, last = path.split(".")
        here = result
        for depth, parent in enumerate(parents):
            here = here.setdefault(parent, {})
            if not isinstance(here, dict):
                stem = ".".join(parents[: depth + 1])
                raise ConfigError(f"{origin}: {path}: {stem} holds no keys (value {here!r})")
        here[last] = copy.deepcopy(value)
    return result
