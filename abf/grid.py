"""Ablation grids: one YAML names base run, arms, axes and seeds; each cell is a checked RunConfig.

A path such as `train.optim.lr` replaces what stands there (no merging of mappings: what a cell
runs is readable from the base and the grid alone).
"""

from __future__ import annotations

import copy
import difflib
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from abf.base import ConfigModel, Seed
from abf.checked import Keys, Where, find, in_file, read_yaml, validate
from abf.config import LONGEST_ARM, ArmName, Name, RunConfig, load
from abf.errors import ConfigError

Overrides = dict[str, Any]

OWN = {
    "study": "it is the grid's own `study`",
    "arm": "the names under `arms` and the axes make it",
    "seed": "list the seeds under `seeds`",
}
"""Keys of a cell that the grid sets, and from what."""


class GridSpec(ConfigModel):
    """An ablation grid."""

    study: Name
    """Name of the study: MLflow experiment, report folder."""
    base: str
    """Run YAML that every cell starts from, relative to the grid file."""
    arms: dict[ArmName, Overrides] = Field(default={"main": {}}, min_length=1)
    """Arm name -> dotted path -> value. `recipe: FILE` stands for the paths and values of another
    YAML file (relative to the grid file), which come before the arm's own."""
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
    """Dotted path -> values; every combination runs with every arm."""
    seeds: tuple[Seed, ...] = Field(default=(0,), min_length=1)
    """Seeds of training and decoding; the interval over seeds is over these."""
    exclude: tuple[Overrides, ...] = ()
    """Combinations left out: an `arm` and/or axis values that must all match."""

    def model_post_init(self, context: object) -> None:
        arms = {f"arms.{name}": overrides for name, overrides in self.arms.items()}
        for place, paths in {"axes": self.axes, **arms}.items():
            for key in (key for key in OWN if key in paths):
                raise ValueError(
                    f"{place}.{key}: the grid sets {key!r} of every cell ({OWN[key]}); "
                    f"value {paths[key]!r}"
                )


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
        _check_run(path, raw)
        config = load(path)
        return Study(config.study, path, (Cell(f"{config.arm}-s{config.seed}", config),))
    spec = validate(GridSpec, raw, in_file(path))
    base = (path.parent / spec.base).resolve()
    document = _read(base, ("base",), f"base: {spec.base}", path)
    if isinstance(document.get("base"), str) or GRID & document.keys():
        place = in_file(path)(("base",))
        raise ConfigError(f"{place}: base: {spec.base} is a grid itself; name the file of a run")
    cells = []
    arms = {arm: _with_recipe(overrides, arm, path) for arm, overrides in spec.arms.items()}
    for arm, name, values in _combinations(spec, path):
        changes = [*arms[arm].items(), *values.items()]
        cell = _apply(document, changes, lambda arm=arm, name=name: _arm(path, arm, name))
        where = _where(path, spec, arm, name, base)
        for seed in spec.seeds:
            stated = {**cell, "study": spec.study, "arm": name, "seed": seed}
            cells.append(Cell(f"{name}-s{seed}", validate(RunConfig, stated, where)))
    if not cells:
        raise ConfigError(f"{path}: `exclude` leaves no cell")
    names = [cell.name for cell in cells]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            f"{path}: cells named twice: {', '.join(twice)}; a seed is listed twice, or an arm is "
            "named like another with its axis values"
        )
    return Study(spec.study, path, tuple(cells))


GRID = {"arms", "axes", "seeds", "exclude"}
"""Keys that a grid has and a run has not."""


def _check_run(path: Path, raw: Mapping[str, Any]) -> None:
    """Refuse a grid without a base, and a recipe that no arm names."""
    where = in_file(path)
    for key in (key for key in raw if key in GRID):
        base = f", not {raw['base']!r}" if "base" in raw else ""
        raise ConfigError(
            f"{where((key,))}: {key}: only a grid has this key, and a grid names the run that its "
            f"cells start from: add `base: RUN.yaml`{base}, or take {key!r} out"
        )
    if "recipe" in raw:
        raise ConfigError(
            f"{where(('recipe',))}: recipe: {raw['recipe']!r} belongs to an arm of a grid, and "
            "this is the file of a run: write a grid with `study: NAME`, `base: THIS_FILE.yaml` "
            f"and `arms: {{NAME: {{recipe: {raw['recipe']}}}}}`"
        )


def _read(file: Path, keys: Keys, said: str, path: Path) -> dict[str, Any]:
    """A file that a grid names, at these keys."""
    if not file.is_file():
        raise ConfigError(
            f"{in_file(path)(keys)}: {said}: {file} does not exist; name it relative to the "
            f"folder of {path}"
        )
    return read_yaml(file)


def _where(path: Path, spec: GridSpec, arm: str, name: str, base: Path) -> Where:
    """Where a key of a cell was written: at an axis, the arm, its recipe, or in the base."""
    recipe = spec.arms[arm].get("recipe")
    places = [(path, ("axes",)), (path, ("arms", arm))]
    if recipe:
        places.append(((path.parent / recipe).resolve(), ()))

    def where(keys: Keys) -> str:
        cell = f"arm {name!r} over {spec.base}"
        for file, below in [*places, (base, ())]:
            depth, line = find(file, keys, below=below)
            if depth:
                of = "" if file == path else f" of {path}"
                return f"{file}:{line}: {cell}{of}"
        return f"{path}:{find(path, ('arms', arm))[1] or 1}: {cell}"

    return where


def _arm(path: Path, arm: str, name: str) -> str:
    return f"{in_file(path)(('arms', arm))}: arm {name!r}"


def _with_recipe(overrides: Overrides, arm: str, path: Path) -> Overrides:
    """Overrides of an arm, those of its recipe before its own."""
    for key in set(overrides) - set(RunConfig.model_fields) - {"recipe"}:
        if difflib.get_close_matches(key, ["recipe"]):
            place = in_file(path)(("arms", arm, key))
            raise ConfigError(f"{place}: arms.{arm}.{key}: unknown key; did you mean 'recipe'?")
    named = overrides.get("recipe")
    if named is None:
        return overrides
    keys = ("arms", arm, "recipe")
    if not isinstance(named, str):
        place = in_file(path)(keys)
        raise ConfigError(f"{place}: recipe: {named!r} is no file name; write `recipe: FILE.yaml`")
    recipe = _read((path.parent / named).resolve(), keys, f"recipe: {named}", path)
    return recipe | {key: value for key, value in overrides.items() if key != "recipe"}


def _combinations(spec: GridSpec, path: Path) -> Iterator[tuple[str, str, Overrides]]:
    """Arm, name with the axis values, and axis values of every combination that is run."""
    known = ["arm", *spec.axes]
    for number, rule in enumerate(spec.exclude):
        if unknown := sorted(set(rule) - set(known)):
            raise ConfigError(
                f"{in_file(path)(('exclude', number))}: exclude: {', '.join(unknown)} is no axis; "
                f"allowed: {', '.join(known)}"
            )
    axes = [
        _named(key, values, lambda key=key: f"{in_file(path)(('axes', key))}: axes.{key}")
        for key, values in spec.axes.items()
    ]
    for arm, combination in itertools.product(spec.arms, itertools.product(*axes)):
        values = {key: value for key, value, _ in combination}
        here = {"arm": arm, **values}
        if any(all(here[k] == v for k, v in rule.items()) for rule in spec.exclude):
            continue
        name = arm + "".join(f".{key.rpartition('.')[2]}={text}" for key, _, text in combination)
        if len(name) > LONGEST_ARM:
            raise ConfigError(
                f"{path}: arm {name!r} has a name of {len(name)} characters, at most {LONGEST_ARM} "
                f"are allowed: give {arm!r} a shorter name, or make one of the axes "
                f"({', '.join(spec.axes) or 'none'}) arms of a short name"
            )
        yield arm, name, values


def _named(
    key: str, values: Iterable[Any], origin: Callable[[], str]
) -> list[tuple[str, Any, str]]:
    """Axis, value, and what names call the value: a mapping by its kind, the rest as in YAML."""
    named: dict[str, Any] = {}
    for value in values:
        kind = value.get("kind") if isinstance(value, Mapping) else value
        text = kind if isinstance(kind, str) else json.dumps(value, default=str)
        if not re.fullmatch(r"[a-z0-9_.=+-]+", text):
            raise ConfigError(
                f"{origin()}: {value!r} cannot be part of an arm's name (small letters, digits and "
                "_.=+- only; a mapping is named by its `kind`); make its variants arms instead"
            )
        if text in named:
            raise ConfigError(
                f"{origin()}: two values are named {text!r}; list a value once (mappings of the "
                "same `kind` are not told apart: make them arms instead)"
            )
        named[text] = value
    return [(key, value, text) for text, value in named.items()]


def _apply(
    document: Mapping[str, Any], changes: Iterable[tuple[str, Any]], origin: Callable[[], str]
) -> dict[str, Any]:
    """A deep copy of the document with each dotted path set to its value, in this order."""
    result = copy.deepcopy(dict(document))
    done: list[str] = []
    for path, value in changes:
        for before in done:
            if f"{before}.".startswith(f"{path}."):
                raise ConfigError(
                    f"{origin()}: {path} (value {value!r}) replaces {before}, which the arm or an "
                    "axis sets too; set it in one of them"
                )
        *parents, last = path.split(".")
        here = result
        for depth, parent in enumerate(parents):
            here = here.setdefault(parent, {})
            if not isinstance(here, dict):
                stem = ".".join(parents[: depth + 1])
                raise ConfigError(f"{origin()}: {path}: {stem} holds no keys (value {here!r})")
        here[last] = copy.deepcopy(value)
        done.append(path)
    return result
