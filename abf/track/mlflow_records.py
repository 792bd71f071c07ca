"""What of a cell goes into MLflow beside its points: state, cost, tags, small files, the note."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from abf.files import sha256
from abf.stages import MANIFEST
from abf.track.mlflow_points import clean_key, iso_time, milliseconds, to_csv
from abf.track.outcomes import attempt_outcomes

MAX_PARAM_CHARACTERS = 6000
"""MLflow refuses longer parameter values."""
MAX_TAG_CHARACTERS = 8000
"""MLflow refuses longer tag values."""


@dataclass(frozen=True)
class DatasetRef:
    """Data that a cell read, shown by MLflow as a dataset input."""

    name: str
    """For example the key of the packed rows."""
    path: Path
    """File or folder."""
    sha256: str
    """Its hash; MLflow's digest is the first 36 characters."""
    context: str = "train"
    """What it was used for."""


@dataclass(frozen=True)
class Cell:
    """One cell of a grid: a child run."""

    run: str
    """Key of the train stage directory; the cell is found again by it."""
    name: str
    """Arm and seed, the name people read."""
    params: Mapping[str, str]
    """The resolved config, flattened; immutable, since its hash is part of `run`."""
    tags: Mapping[str, str]
    """For example config_hash, git_sha, arm, seed."""
    stage_dirs: Mapping[str, Path]
    """Stage directories whose attempts and scores belong to this cell alone: train, decode, score.
    A name may carry a suffix after a dot (`decode.threshold`)."""
    journals: Sequence[Path] = ()
    """Journals; their metrics are named `{stage}/{metric}`."""
    figures: Sequence[Path] = ()
    """Small figures, copied."""
    artifacts: Sequence[tuple[str, Path, str, int]] = ()
    """Large artifacts kept by reference: name, path, sha256, bytes."""
    datasets: Sequence[DatasetRef] = field(default=())
    """Data sets the run read."""


@dataclass(frozen=True)
class IngestPlan:
    """A grid of a study, as MLflow shows it: experiment = study, parent run = grid."""

    study: str
    grid: str
    cells: Sequence[Cell]
    figures: Sequence[Path] = ()
    """Small figures of the whole grid, copied to the parent run."""


def clean_params(params: Mapping[str, str]) -> dict[str, str]:
    """Parameters within MLflow's limits; a cut value ends in `...`."""
    return {
        clean_key(key): value
        if len(value) <= MAX_PARAM_CHARACTERS
        else value[: MAX_PARAM_CHARACTERS - 3] + "..."
        for key, value in params.items()
    }


@dataclass(frozen=True)
class Progress:
    """What the attempts of a cell amount to."""

    status: str
    """MLflow's run status: FINISHED, RUNNING or FAILED."""
    start: int
    """Milliseconds; first attempt."""
    end: int | None
    """Milliseconds; end of the last attempt, None while running."""
    outcomes: list[dict[str, Any]]
    """Every attempt, with the name of its stage under `stage`."""
    core_hours: float
    """Cores times wall-clock, over every attempt."""

    @property
    def failed(self) -> int:
        """Attempts that neither completed nor still run."""
        return sum(o["state"] not in ("COMPLETED", "RUNNING") for o in self.outcomes)


def cell_progress(stage_dirs: Mapping[str, Path]) -> Progress | None:
    """Attempts and state of a cell; None when nothing of it was ever attempted."""
    outcomes: list[dict[str, Any]] = []
    finished, failed, running = True, False, False
    for stage, directory in stage_dirs.items():
        found = attempt_outcomes(directory)
        outcomes += [outcome | {"stage": stage} for outcome in found]
        running |= any(outcome["state"] == "RUNNING" for outcome in found)
        if not (directory / MANIFEST).exists():
            finished = False
            failed |= bool(found) and found[-1]["state"] not in ("COMPLETED", "RUNNING")
    if not outcomes:
        return None
    outcomes.sort(key=lambda o: (o["start"], o["stage"], o["attempt"]))
    status = "FINISHED" if finished else "FAILED" if failed and not running else "RUNNING"
    return Progress(
        status=status,
        start=milliseconds(outcomes[0]["start"]),
        end=None if status == "RUNNING" else milliseconds(max(o["end"] for o in outcomes)),
        outcomes=outcomes,
        core_hours=sum(o["cores"] * o["elapsed_s"] for o in outcomes) / 3600,
    )


def attempt_tags(progress: Progress) -> dict[str, str]:
    """Attempts and their cost as tags, one a stage: `FAILED 61.2 s (reason), COMPLETED 250.0 s`."""
    by_stage: dict[str, list[str]] = {}
    for outcome in progress.outcomes:
        reason = f" ({outcome['reason']})" if outcome["reason"] else ""
        text = f"{outcome['state']} {outcome['elapsed_s']:.1f} s{reason}"
        by_stage.setdefault(outcome["stage"], []).append(text)
    tags = {
        "abf.attempts": str(len(progress.outcomes)),
        "abf.failed_attempts": str(progress.failed),
        "abf.core_hours": f"{progress.core_hours:.6g}",
        "abf.job_ids": " ".join(dict.fromkeys(str(o["job_id"]) for o in progress.outcomes)),
        **{clean_key(f"attempts.{stage}"): ", ".join(texts) for stage, texts in by_stage.items()},
    }
    return {key: value[:MAX_TAG_CHARACTERS] for key, value in tags.items()}


ATTEMPT_COLUMNS = (
    "stage",
    "attempt",
    "state",
    "job_id",
    "host",
    "started",
    "elapsed_s",
    "cores",
    "core_hours",
    "reason",
)


def attempt_rows(progress: Progress) -> list[dict[str, Any]]:
    """The attempts as rows of a small table (columns ATTEMPT_COLUMNS)."""
    return [
        {
            **{name: outcome.get(name, "") for name in ATTEMPT_COLUMNS},
            "started": iso_time(outcome["start"]),
            "elapsed_s": f"{outcome['elapsed_s']:.2f}",
            "core_hours": f"{outcome['cores'] * outcome['elapsed_s'] / 3600:.6f}",
        }
        for outcome in progress.outcomes
    ]


def cell_files(cell: Cell, progress: Progress, scores_csv: bytes) -> dict[str, bytes | Path]:
    """Small artifacts of a run: artifact path -> content, or a file to copy."""
    files: dict[str, bytes | Path] = {
        "attempts.csv": to_csv(ATTEMPT_COLUMNS, attempt_rows(progress)),
        **figure_files(cell.figures),
    }
    if scores_csv:
        files["scores.csv"] = scores_csv
    if cell.artifacts:
        references = [
            {"name": name, "path": str(path), "bytes": size, "sha256": digest}
            for name, path, digest, size in cell.artifacts
        ]
        files["references.json"] = (json.dumps(references, indent=2) + "\n").encode()
    return files


def figure_files(figures: Iterable[Path]) -> dict[str, bytes | Path]:
    """Artifact path of every figure that exists."""
    return {f"figures/{figure.name}": figure for figure in figures if figure.exists()}


def files_digest(files: Mapping[str, bytes | Path]) -> str:
    """One hash over names and contents, so that unchanged artifacts are not copied again."""
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name]
        inner = sha256(content) if isinstance(content, Path) else _hash(content)
        digest.update(f"{name}\0{inner}\n".encode())
    return digest.hexdigest()


def _hash(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def note(cell: Cell, progress: Progress, missing: Sequence[str]) -> str:
    """Markdown that MLflow shows on the run's page."""
    lines = [
        f"**{cell.name}**, run `{cell.run}`",
        "",
        f"- {len(progress.outcomes)} attempts, {progress.failed} of them not completed;"
        f" {progress.core_hours:.4g} core-hours in all (table: `attempts.csv`)",
        "- Scores are metrics `task/decoder/metric`; `interval/..._ci_low` and `_ci_high` bound"
        " the interval over documents (table: `scores.csv`)",
        "- Large files are listed in `references.json` with size and sha256",
    ]
    if missing:
        lines.append(f"- Not measured: {', '.join(missing)}")
    return "\n".join(lines)
