"""One planned stage directory: what its `config.json` says, and what it reads from outside."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abf.cluster.config import LaunchConfig
from abf.data.local import matching_files
from abf.files import make_folder, read_if_json
from abf.hardware import resolve_precision
from abf.site import job_gpus
from abf.stages import STAGES

LAUNCH = "launch.json"
"""File beside `config.json` of what is trained: its `LaunchConfig`."""
Inputs = dict[str, "Instance | list[Instance]"]


@dataclass(frozen=True)
class Instance:
    """One stage directory of the plan."""

    stage: str
    key: str
    config: Mapping[str, Any]
    inputs: Inputs = field(default_factory=dict)
    threads: int = 1
    launch: LaunchConfig | None = None
    """How a cluster runs it, for what is trained; no part of what it computes."""

    @functools.cached_property
    def files(self) -> tuple[Path, ...]:
        """Files from outside that it reads: when they change it runs again."""
        return tuple(outside_files(self.stage, self.config))

    @property
    def direct(self) -> list[Instance]:
        """What it reads."""
        lists = (found if isinstance(found, list) else [found] for found in self.inputs.values())
        return [instance for found in lists for instance in found]

    @property
    def place(self) -> str:
        """Where it lives, relative to the results folder."""
        return f"{self.stage}/{self.key}"

    def directory(self, results: Path) -> Path:
        """Where it lives."""
        return results / self.place


def digest(value: Any) -> str:
    """8 hex digits over canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def origin(stage: str, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Setting of what a stage gets from outside the results: source or checkpoint; empty: nothing.

    Args:
        config: part `config` of the stage's `config.json`.
    """
    if stage == "fetch":
        return config["source"]
    imported = stage == "base" and config["base"]["kind"] == "import"
    return config["base"]["checkpoint"] if imported else {}


def outside_files(stage: str, config: Mapping[str, Any]) -> list[Path]:
    """Local files of its origin, as they are now; a package is pinned by its version instead."""
    found = origin(stage, config)
    return matching_files(found["path"]) if found.get("kind") in ("local", "directory") else []


def resolved(instance: Instance, path: Path) -> dict[str, Any]:
    """Content of `config.json`. `auto` is resolved on first writing and never again for a key."""
    assert instance.stage in STAGES, instance.stage
    config = json.loads(json.dumps(instance.config))
    choices: dict[str, dict[str, str]] = {}
    before = (read_if_json(path) or {}).get("resolved", {})

    def settle(node: Any, where: str) -> None:
        if not isinstance(node, dict):
            return
        for name, value in node.items():
            here = f"{where}.{name}" if where else name
            if name == "precision" and value == "auto":
                if here not in before:
                    chosen, why = resolve_precision(job_gpus())
                    choices[here] = {"requested": "auto", "value": chosen, "because": why}
                else:
                    choices[here] = before[here]
                node[name] = choices[here]["value"]
            else:
                settle(value, here)

    settle(config, "")
    return {
        "stage": instance.stage,
        "key": instance.key,
        "config": config,
        "inputs": {
            name: [i.place for i in up] if isinstance(up, list) else up.place
            for name, up in instance.inputs.items()
        },
        "resolved": choices,
    }


def write_if_changed(path: Path, document: dict[str, Any]) -> bool:
    """Write unless the file says so already: Snakemake reruns what reads a changed file."""
    before = read_if_json(path)
    if before == document:
        return False
    make_folder(path.parent)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(document, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    os.replace(temporary, path)
    return True


def trainings(instances: Iterable[Instance]) -> dict[LaunchConfig, list[str]]:
    """Launch settings of a plan's jobs, each with the directories that have them."""
    found: dict[LaunchConfig, list[str]] = {}
    for instance in instances:
        if instance.launch is not None:
            found.setdefault(instance.launch, []).append(instance.place)
    return found
