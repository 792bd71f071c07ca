"""The stages of the pipeline: names, versions, payloads. Standard library only: the planner's."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Stage:
    """One kind of stage directory."""

    name: str
    """Rule and folder name."""
    version: int
    """Bump it when the stage's code changes what it writes: Snakemake then reruns it."""
    payload: tuple[str, ...]
    """Files and folders that the stage publishes beside its manifest."""
    pure: bool = True
    """What it writes follows from its configuration and inputs: finished work can be declared
    finished again instead of being done twice."""


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage("fetch", 1, ("raw",), pure=False),
        Stage("prepare", 1, ("documents",)),
        Stage("tokenizer", 1, ("tokenizer",)),
        Stage("tokenize", 1, ("tokens",)),
        Stage("segment", 2, ("segments",)),
        Stage("pack", 1, ("packed",)),
        Stage("base", 2, ("base",)),
        Stage("convert", 2, ("init",)),
        Stage("train", 2, ("model", "metrics.parquet")),
        Stage("decode", 5, ("samples.parquet", "trace.arrows")),
        Stage("score", 2, ("scores.parquet", "documents.parquet")),
        Stage("ledger", 1, ("ledger.parquet",), pure=False),
        Stage("report", 2, ("index.html", "figures"), pure=False),
        Stage("mlflow", 1, ("ingested.json",), pure=False),
    )
}

SO_FAR = "so-far"
"""Folder in a report's directory: the books of its study before that is finished."""
CONFIG = "config.json"
"""What a stage directory is to hold, written before it is made."""
ENDS = ("ledger", "report", "mlflow")
"""Stages that a study has one directory of, named after it."""
FREE = frozenset({"fetch", *ENDS})
"""Stages that the driver does itself (profiles/leonardo): they are billed nothing."""


def stage_dir(path: Path | str) -> Path:
    """The stage directory, given it or its manifest."""
    path = Path(path)
    return path.parent if path.name == MANIFEST else path
