"""From a study to stage directories: keys, inputs, and the `config.json` each stage reads.

A key is a readable slug and 8 hex digits of a hash over only what the stage's chain reads, so a
learning rate never re-tokenizes, and a changed cell never overwrites a finished one.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abf.base import ConfigModel
from abf.cluster.config import LaunchConfig
from abf.data.config import PackConfig, Source, StdlibSource
from abf.errors import ConfigError
from abf.eval.config import GENERATIVE_KINDS
from abf.grid import Cell, Study
from abf.instance import LAUNCH, Inputs, Instance, digest, resolved, write_if_changed
from abf.segment.config import SentenceSegmenter
from abf.stages import CONFIG, ENDS, MANIFEST

DEFAULT_MAX_BLOCK = PackConfig().max_block


@dataclass(frozen=True)
class PlannedCell:
    """A cell with the stage directories it ends in."""

    cell: Cell
    run: str
    train: Instance
    decodes: Mapping[str, Instance]
    score: Instance
    pack: Instance
    base: Instance
    tokenizer: Instance
    sources: tuple[Instance, ...]


class Plan:
    """All stage directories of a study; equal work is planned once, whichever arm asks for it."""

    def __init__(self, study: Study, results: Path) -> None:
        self.study, self.results = study, results
        self.instances: dict[tuple[str, str], Instance] = {}
        self._above: dict[str, frozenset[tuple[str, str]]] = {}
        self.cells = tuple(self._cell(cell) for cell in study.cells)
        scores = [cell.score for cell in self.cells]
        which = {"plan": self.path.name}
        self.ledger = self._add("ledger", study.name, which, {"scores": scores}, keyed=False)
        everything: Inputs = {"ledger": self.ledger}
        report = which | {"report": _dump(study.cells[0].config.report)}
        self.report = self._add("report", study.name, report, everything, keyed=False)
        shown: Inputs = {"report": self.report, "ledger": self.ledger}
        self.mlflow = self._add("mlflow", study.name, which, shown, keyed=False)

    def _add(
        self,
        stage: str,
        slug: str,
        config: Mapping[str, Any],
        inputs: Inputs | None = None,
        *,
        keyed: bool = True,
        threads: int = 1,
        launch: LaunchConfig | None = None,
    ) -> Instance:
        """The stage directory with this content; made on first use."""
        inputs = inputs or {}
        upstream = {
            name: [i.key for i in found] if isinstance(found, list) else found.key
            for name, found in inputs.items()
        }
        key = f"{slug}-{digest([stage, config, upstream])}" if keyed else slug
        known = self.instances.get((stage, key))
        if known is None:
            known = Instance(stage, key, dict(config), inputs, threads, launch)
            self.instances[stage, key] = known
        return known

    def _source(self, source: Source) -> Instance:
        settings: dict[str, Any] = {"source": _dump(source)}
        if isinstance(source, StdlibSource):
            settings["python"] = platform.python_version()  # another one has another text
        return self._add("fetch", _source_slug(source), settings)

    def _cell(self, cell: Cell) -> PlannedCell:
        cfg = cell.config
        sources = tuple(self._source(source) for source in cfg.sources)
        documents = self._add(
            "prepare", "documents", {"prepare": _dump(cfg.prepare)}, {"raw": list(sources)}
        )
        pack_cfg, base_cfg = {"pack": _dump(cfg.pack)}, _dump(cfg.base)
        imported = cfg.base.kind == "import"
        base: Instance | None = None
        if imported:
            base = self._add("base", "import", {"base": base_cfg})
        source_of_tokens = base if base is not None else documents
        tokenizer = self._add(
            "tokenizer",
            cfg.tokenizer.kind,
            {"tokenizer": _dump(cfg.tokenizer)},
            {"source": source_of_tokens},
        )
        tokens = self._add(
            "tokenize", "tokens", {}, {"documents": documents, "tokenizer": tokenizer}
        )

        def packed(segmenter: ConfigModel, rows: PackConfig) -> Instance:
            inputs: Inputs = {"documents": documents, "tokens": tokens}
            reference = getattr(segmenter, "like", None)
            settings: dict[str, Any] = {"segmenter": _dump(segmenter)}
            if reference is not None:
                inputs["reference"] = packed(reference, rows).inputs["segments"]
                # Lengths are matched as blocks, after the cap.
                settings["max_block"] = rows.max_block
            kind = segmenter.model_dump(include={"kind"})["kind"]
            segments = self._add("segment", kind, settings, inputs)
            return self._add(
                "pack",
                kind,
                {"pack": _dump(rows)},
                {"tokens": tokens, "segments": segments, "tokenizer": tokenizer},
            )

        pack = packed(cfg.segmenter, cfg.pack)
        # Every arm converts the same base model, so its rows must not depend on the arm.
        length = cfg.pack.row_length
        rows = PackConfig(row_length=length, max_block=min(DEFAULT_MAX_BLOCK, length - 1))
        common = packed(SentenceSegmenter(), rows)
        if base is None:
            threads = base_cfg["train"]["threads"]
            base = self._add(
                "base",
                "pretrain",
                {"base": base_cfg},
                {"packed": common},
                threads=threads,
                launch=cfg.launch,
            )
        init = self._add("convert", cfg.base.kind, pack_cfg, {"base": base, "packed": common})
        # Neither arm nor decoder: cells that only decode otherwise share their training.
        how = "ar" if cfg.train.objective.kind == "ar" else cfg.segmenter.kind
        train = self._add(
            "train",
            f"{how}-s{cfg.seed}",
            {"train": _dump(cfg.train), "seed": cfg.seed},
            {"init": init, "packed": pack},
            threads=cfg.train.threads,
            launch=cfg.launch,
        )
        objective = cfg.train.objective.model_dump(mode="json")
        decodes = {}
        for task, task_cfg in cfg.tasks.items():
            if task_cfg.kind not in GENERATIVE_KINDS:
                continue
            for decoder, decoder_cfg in cfg.settled_decoders.items():
                name = f"{task}.{decoder}"
                decodes[name] = self._add(
                    "decode",
                    f"{train.key}/{name}",
                    {
                        "task": _dump(task_cfg),
                        "decoder": _dump(decoder_cfg),
                        "objective": objective,
                        "seed": cfg.seed,
                    },
                    {"train": train, "packed": pack, "tokenizer": tokenizer},
                    threads=decoder_cfg.threads,
                )
        score = self._add(
            "score",
            cell.name,
            {
                "tasks": {name: _dump(task) for name, task in cfg.tasks.items()},
                "decoders": {
                    name: _dump(decoder) for name, decoder in cfg.settled_decoders.items()
                },
                "scoring": _dump(cfg.scoring),
                "objective": objective,
                "seed": cfg.seed,
                "arm": cfg.arm,
            },
            {
                "train": train,
                "base": base,
                "packed": pack,
                "tokenizer": tokenizer,
                "decodes": list(decodes.values()),
            },
            threads=cfg.scoring.threads,
        )
        return PlannedCell(cell, score.key, train, decodes, score, pack, base, tokenizer, sources)

    def write(self) -> int:
        """Write every `config.json` whose text changes, and the plan itself; how many changed."""
        changed = 0
        for instance in self.instances.values():
            path = instance.directory(self.results) / CONFIG
            changed += write_if_changed(path, self.document(instance))
            if instance.launch is not None:
                # Beside the configuration, not in it: another number of nodes reruns nothing.
                changed += write_if_changed(path.with_name(LAUNCH), _dump(instance.launch))
        return changed + write_if_changed(self.path, self.as_document())

    def document(self, instance: Instance) -> dict[str, Any]:
        """What `write` puts into an instance's `config.json`."""
        return resolved(instance, instance.directory(self.results) / CONFIG)

    @property
    def path(self) -> Path:
        """File that lists the study's cells and directories, read by ledger, report and ingest."""
        return self.results / "plan" / f"{self.study.name}.json"

    @property
    def cap_node_hours(self) -> float | None:
        """What the study may spend.

        Raises:
            ConfigError: its cells say different things.
        """
        caps = {cell.config.budget.cap_node_hours for cell in self.study.cells}
        if len(caps) > 1:
            raise ConfigError(
                f"{self.study.path}: budget.cap_node_hours is one figure for the whole study, but "
                f"its cells say {', '.join(map(str, caps))}; set it in the base run only"
            )
        return caps.pop()

    def as_document(self) -> dict[str, Any]:
        """The plan as JSON values."""
        cells = [
            {
                "name": planned.cell.name,
                "arm": planned.cell.config.arm,
                "seed": planned.cell.config.seed,
                "run": planned.run,
                # Caps and nodes may change at any time; what a cell computes stays what it is.
                "config": planned.cell.config.model_dump(mode="json", exclude={"budget", "launch"}),
                "bound": planned.cell.config.train.objective.bound,
                "train": planned.train.place,
                "decodes": {name: d.place for name, d in planned.decodes.items()},
                "score": planned.score.place,
                "packed": planned.pack.place,
                "segments": _one(planned.pack, "segments").place,
                "tokens": _one(planned.pack, "tokens").place,
                "base": planned.base.place,
                "tokenizer": planned.tokenizer.place,
                "sources": [source.place for source in planned.sources],
            }
            for planned in self.cells
        ]
        return {
            "study": self.study.name,
            "grid": self.study.path.name,
            "cap_node_hours": self.cap_node_hours,
            "cells": cells,
            "stages": [i.place for i in self.instances.values() if i.stage not in ENDS],
        }

    # --- what the Snakefile asks -------------------------------------------------------------

    def targets(self) -> list[str]:
        """Manifests of the report and of the MLflow ingest."""
        return [self._manifest(self.report), self._manifest(self.mlflow)]

    def inputs(self, stage: str) -> Callable[[Any], list[str]]:
        """Input function of a stage's rule: its config, and the manifests it has to wait for.

        What an input was itself made from is left out: the order and the reruns are the same, and
        a grid's graph has a third of the edges. The command reads every input from `config.json`.
        """

        def inputs_of_stage(wildcards: Any) -> list[str]:
            instance = self.find(stage, wildcards.key)
            direct = instance.direct
            implied = {above for i in direct for above in self._ancestors(i)}
            waits = [self._manifest(i) for i in direct if (i.stage, i.key) not in implied]
            outside = map(str, instance.files)
            return [f"{self.results}/{instance.place}/{CONFIG}", *waits, *outside]

        return inputs_of_stage

    def _ancestors(self, instance: Instance) -> frozenset[tuple[str, str]]:
        """Stage and key of everything an instance is made from."""
        known = self._above.get(instance.place)
        if known is None:
            found: set[tuple[str, str]] = set()
            for i in instance.direct:
                found |= self._ancestors(i) | {(i.stage, i.key)}
            known = self._above[instance.place] = frozenset(found)
        return known

    def threads(self, stage: str) -> Callable[[Any], int]:
        """Threads function of a stage's rule."""

        def threads_of_stage(wildcards: Any) -> int:
            return self.find(stage, wildcards.key).threads

        return threads_of_stage

    def find(self, stage: str, key: str) -> Instance:
        """The planned directory.

        Raises:
            ConfigError: this study does not plan it.
        """
        if (stage, key) not in self.instances:
            known = ", ".join(k for s, k in sorted(self.instances) if s == stage)
            raise ConfigError(f"{self.study.path} plans no {stage}/{key}; it plans: {known}")
        return self.instances[stage, key]

    def _manifest(self, instance: Instance) -> str:
        return f"{self.results}/{instance.place}/{MANIFEST}"


def _dump(config: ConfigModel) -> dict[str, Any]:
    return config.model_dump(mode="json")


def _one(instance: Instance, name: str) -> Instance:
    found = instance.inputs[name]
    assert isinstance(found, Instance)
    return found


def _source_slug(source: ConfigModel) -> str:
    fields = source.model_dump()
    if fields["kind"] == "pypi":
        return fields["requirement"].partition("==")[0].lower()
    return fields["kind"]
