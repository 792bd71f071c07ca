"""What of a run goes into MLflow beside its points: state, attempts, tags, files, the note."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from abf.files import sha256
from abf.track.mlflow_costs import (
    ALIVE,
    Row,
    cost_line,
    cost_table,
    energy_source,
    has_failed,
    ordered,
    states,
)
from abf.track.mlflow_points import clean_key, to_csv
from abf.track.mlflow_progress import Progress, by_stage

MAX_PARAM_CHARACTERS = 6000
"""MLflow refuses longer parameter values."""
MAX_TAG_CHARACTERS = 8000
"""MLflow refuses longer tag values."""
MAX_FAILURES = 10
"""Failed directories that the page of a grid names."""


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
    """Stage directories whose attempts and scores this cell shows: train, decode, score. A name
    may carry a suffix after a dot (`decode.threshold`)."""
    journals: Sequence[Path] = ()
    """Journals, whose metrics are named `{stage}/{metric}`, and samples of the system
    (`abf.track.system`), whose metrics are named `system/{metric}`."""
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
    results: Path
    """Folder that holds all stage directories."""
    rows: Sequence[Row] = ()
    """The study's ledger: rows of all its attempts, those at shared stages included."""
    figures: Sequence[Path] = ()
    """Small figures of the whole grid, copied to the parent run."""
    driven: bool = True
    """Whether a driver is at work: else what is unfinished and not running has failed."""


def clean_params(params: Mapping[str, str]) -> dict[str, str]:
    """Parameters within MLflow's limits; a cut value ends in `...`."""
    return {
        clean_key(key): value
        if len(value) <= MAX_PARAM_CHARACTERS
        else value[: MAX_PARAM_CHARACTERS - 3] + "..."
        for key, value in params.items()
    }


def attempt_tags(found: Progress) -> dict[str, str]:
    """Attempts and what measured them: states, job ids, and one tag a stage with reasons."""
    own, shared = found.charged("run"), found.charged("grid")
    told = [states(own), f"shared: {states(shared)}" if shared else ""]
    tags = {
        "abf.attempt_states": "; ".join(filter(None, told)),
        "abf.charged": ", ".join(by_stage(own)),
        "abf.energy_source": energy_source(own),
        "abf.job_ids": " ".join(dict.fromkeys(row["job_id"] for row in found.rows)),
    }
    for stage, rows in by_stage(found.rows).items():
        tags[clean_key(f"attempts.{stage}")] = ", ".join(
            f"{row['state']} {row['elapsed_s']:.1f} s"
            + (f" ({row['reason']})" if row["reason"] else "")
            for row in rows
        )
    return {key: value[:MAX_TAG_CHARACTERS] for key, value in tags.items()}


ATTEMPT_COLUMNS = (
    *("stage", "attempt", "state", "elapsed_s", "job_id", "host", "reason", "cluster"),
    *("submit_time", "nodes", "gpus", "node_hours", "gpu_hours", "core_hours"),
    *("energy_j", "energy_source", "charged_to"),
)
"""Columns of `attempts.csv`: the ledger's, with the stage, the host and who is charged."""


def cell_files(cell: Cell, found: Progress, scores_csv: bytes) -> dict[str, bytes | Path]:
    """Small artifacts of a run: artifact path -> content, or a file to copy."""
    files: dict[str, bytes | Path] = {
        "attempts.csv": to_csv(ATTEMPT_COLUMNS, found.rows),
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


def cell_note(cell: Cell, found: Progress, missing: Sequence[str]) -> str:
    """Markdown that MLflow shows on the run's page."""
    own, shared = found.charged("run"), by_stage(found.charged("grid"))
    lines = [
        cost_line(own),
        "",
        *cost_table(
            by_stage(own),
            {f"{stage}, shared: charged to the parent run": rows for stage, rows in shared.items()},
        ),
        "",
        "- Every attempt is in `attempts.csv`; what cells share (data, base model) is charged to "
        "the parent run",
        "- Scores are metrics `task/decoder/metric`; `interval/..._ci_low` and `_ci_high` bound"
        " the interval over documents (table: `scores.csv`)",
        "- Large files are listed in `references.json` with size and sha256",
    ]
    if missing:
        lines.append(f"- Not measured: {', '.join(missing)}")
    return "\n".join(lines)


def grid_note(plan: IngestPlan, rows: Sequence[Row], waiting: int) -> str:
    """Markdown on the page of the parent run.

    Args:
        rows: the ledger's, with `cell`: the run that is charged, empty for the grid itself.
        waiting: cells not begun.
    """
    groups: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: bool(row["cell"])):
        label = f"{row['rule']}, cells" if row["cell"] else f"{row['rule']}, shared"
        groups.setdefault(label, []).append(row)
    last = {f"{row['rule']}/{row['run']}": row for row in ordered(rows)}
    failures = [
        f"- **{place}** {row['state']} after {row['elapsed_s']:.1f} s: {row['reason'] or '?'}"
        for place, row in last.items()
        if has_failed(row) and row["state"] not in ALIVE
    ]
    more = [f"- and {len(failures) - MAX_FAILURES} more"] if len(failures) > MAX_FAILURES else []
    lines = [
        f"{cost_line(rows)}; {len(plan.cells)} cells, {waiting} not begun",
        "",
        *failures[:MAX_FAILURES],
        *more,
        "",
        *cost_table(groups, {}),
        "",
        "- Costs here are all of the grid: what its cells (the child runs) share, and their sum",
        "- Every attempt is in `attempts.csv`; `cell` is the run that is charged, none the grid",
    ]
    return "\n".join(lines)
