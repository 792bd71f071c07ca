"""A whole study, seen from its plan: what is done, what MLflow should show, the UI on top of it."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abf.artifacts import PlanDocument, read_manifest, read_plans
from abf.errors import ConfigError
from abf.files import lock_holder, make_folder, read_if_json, sha256
from abf.grid import load_study
from abf.ledger.slurm import rows_so_far
from abf.outside import check_outside
from abf.plan import Plan
from abf.report.config import ReportConfig
from abf.report.inputs import MissingCell, ReportCell, ReportPlan, SourceNote
from abf.site import load_node
from abf.stage import git_sha
from abf.stages import CONFIG, MANIFEST
from abf.track.mlflow_records import Cell, DatasetRef, IngestPlan
from abf.track.mlflow_store import ingest
from abf.track.mlflow_view import CELLS, GRIDS, runs_page
from abf.track.outcomes import attempt_outcomes
from abf.track.system import SYSTEM


def flatten(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names; lists stay one value."""
    if isinstance(value, dict) and value:
        return {
            name: text
            for key, item in value.items()
            for name, text in flatten(item, f"{prefix}.{key}" if prefix else str(key)).items()
        }
    return {prefix: value if isinstance(value, str) else json.dumps(value)}


def _manifest(directory: Path) -> dict[str, Any] | None:
    return read_if_json(directory / MANIFEST)


def _references(directory: Path) -> list[tuple[str, Path, str, int]]:
    """Files of a finished stage directory, for MLflow to point to."""
    manifest = _manifest(directory)
    if manifest is None:
        return []
    return [
        (f"{manifest['stage']}/{name}", directory / name, entry["sha256"], entry["bytes"])
        for name, entry in manifest["files"].items()
    ]


def _cell(cell: Mapping[str, Any], results: Path) -> Cell:
    train, score, packed = (results / cell[name] for name in ("train", "score", "packed"))
    stage_dirs = {"train": train, "score": score}
    stage_dirs |= {f"decode.{name}": results / place for name, place in cell["decodes"].items()}
    manifest = _manifest(train) or {}
    config_hash = hashlib.sha256(json.dumps(cell["config"], sort_keys=True).encode()).hexdigest()
    packed_manifest = packed / MANIFEST
    datasets = ()
    if packed_manifest.exists():
        content = hashlib.sha256(packed_manifest.read_bytes()).hexdigest()
        datasets = (DatasetRef(packed.name, packed / "packed", content),)
    artifacts = [ref for directory in stage_dirs.values() for ref in _references(directory)]
    return Cell(
        run=cell["run"],
        name=cell["name"],
        params=flatten(cell["config"]),
        tags={
            "config_hash": config_hash,
            "git_sha": manifest.get("git_sha", "unknown"),
            "rule": "train",
            "arm": cell["arm"],
            "seed": str(cell["seed"]),
        },
        stage_dirs=stage_dirs,
        journals=[*train.glob("journal.jsonl"), *sorted(train.glob(f"{SYSTEM}*.jsonl"))],
        artifacts=artifacts,
        datasets=datasets,
    )


def _own_store(folder: Path) -> str:
    """URI of the store below `results`; one that was copied from elsewhere is begun anew.

    MLflow keeps absolute artifact paths. The store only mirrors files, so nothing is lost.
    """
    make_folder(folder)
    home, here = folder / "home", f"{folder.resolve()}\n"
    if home.exists() and home.read_text(encoding="utf-8") != here:
        print(f"{folder} was moved or copied here: the MLflow store is made anew from the files")
        for path in folder.glob("mlflow.db*"):
            path.unlink()
        shutil.rmtree(folder / "artifacts", ignore_errors=True)
    home.write_text(here, encoding="utf-8")
    return f"sqlite:///{(folder / 'mlflow.db').absolute()}"


def ingest_study(
    plan: PlanDocument, results: Path, rows: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Bring MLflow up to date with what the study has on disk, finished or not.

    Args:
        rows: the study's ledger (schema LEDGER), or as much of it as there is.
    """
    folder = results / "mlflow"
    uri = os.environ.get("MLFLOW_TRACKING_URI") or _own_store(folder)
    cells = [_cell(cell, results) for cell in plan["cells"]]
    figures = sorted((results / "report" / plan["study"] / "figures").glob("*.svg"))
    name, driven = Path(plan["grid"]).stem, is_driven(results)
    grid = IngestPlan(plan["study"], name, cells, results, rows, figures, driven)
    return ingest(grid, tracking_uri=uri, artifact_root=folder / "artifacts")


def is_driven(results: Path) -> bool:
    """Whether a driver is at work; not one that has called us, as it does when it ends (so_far)."""
    holder = lock_holder(results / ".driver" / ".lock")
    return holder is not None and holder.alive is not False and holder.process != os.getppid()


def report_plan(
    plan: PlanDocument,
    results: Path,
    *,
    ledger: Path,
    config: ReportConfig,
    missing: Mapping[str, str] | None = None,
) -> ReportPlan:
    """What the report page of a study is made of.

    Args:
        missing: why, by the name of each cell that is not finished; one at least must be.
    """
    missing = missing or {}
    first = next(cell for cell in plan["cells"] if cell["name"] not in missing)
    packed = read_manifest(results / first["packed"])
    tokens = read_manifest(results / first["tokens"])
    base = read_manifest(results / first["base"])
    facts = {
        "grid": str(plan["grid"]),
        "packed rows (train, held-out)": _counts(packed, "rows"),
        "base model": f"{first['base']}, {base['counts']['parameters']:,} parameters",
        "platform": f"{platform.machine()}, {os.cpu_count()} cores, "
        f"torch {packed['versions']['torch']}, python {packed['versions']['python']}",
    }
    return ReportPlan(
        study=plan["study"],
        created=time.strftime("%Y-%m-%d %H:%M %z"),
        git_sha=git_sha(),
        cells=[_report_cell(c, results) for c in plan["cells"] if c["name"] not in missing],
        missing=[
            MissingCell(c["name"], missing[c["name"]], _report_cell(c, results))
            for c in plan["cells"]
            if c["name"] in missing
        ],
        ledger=ledger,
        tokenizer=results / first["tokenizer"] / "tokenizer",
        sources=[_source(results / place) for place in first["sources"]],
        tokens={split: tokens["counts"][f"{split}_tokens"] for split in ("train", "heldout")},
        facts=facts,
        config=config,
    )


def _report_cell(cell: Mapping[str, Any], results: Path) -> ReportCell:
    return ReportCell(
        arm=cell["arm"],
        seed=cell["seed"],
        run=cell["run"],
        train=results / cell["train"],
        score=results / cell["score"],
        pack=results / cell["packed"],
        base=results / cell["base"],
        decodes={name: results / place for name, place in cell["decodes"].items()},
        bound=cell["bound"],
    )


def _counts(manifest: Mapping[str, Any], name: str) -> str:
    counts = manifest["counts"]
    return ", ".join(f"{counts[f'{split}_{name}']:,}" for split in ("train", "heldout"))


def _source(directory: Path) -> SourceNote:
    source = json.loads((directory / CONFIG).read_text(encoding="utf-8"))["config"]["source"]
    counts = read_manifest(directory)["counts"]
    return SourceNote(
        name=str(counts.get("source", directory.name)),
        licence=source["licence"],
        attribution=source["attribution"],
        documents=counts["n_documents"],
    )


def serve_ui(results: Path, port: int) -> None:
    """Ingest every study below `results` and serve the MLflow UI on loopback until Ctrl-C.

    Raises:
        ConfigError: there is no study yet, or the port is taken or none.
    """
    if not 0 <= port <= 65535:
        raise ConfigError(f"port {port} does not exist: take one of 1 to 65535, 0 for a free one")
    plans = read_plans(results)
    if not plans:
        raise ConfigError(f"{results} holds no study yet; run `make demo` first")
    pages = {}
    for plan in plans:
        trouble: list[str] = []
        rows = rows_so_far(results, plan["stages"], node=load_node(), trouble=trouble)
        for text in trouble:
            print(text, file=sys.stderr, flush=True)
        counts = ingest_study(plan, results, rows)
        print(f"ingest {plan['study']}: {counts}", flush=True)
        for view, name in ((CELLS, "cells"), (GRIDS, "grids")):
            pages[f"study {plan['study']}, {name}"] = runs_page(counts["experiment"], view)
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise ConfigError(
                f"port {port} of 127.0.0.1 cannot be had ({error.strerror}); `make ui PORT=0` "
                "takes a free one (`abf ui --port 0` where the environment is activated)"
            ) from None
        port = probe.getsockname()[1]
    folder = (results / "mlflow").absolute()
    command = [
        *(sys.executable, "-m", "mlflow", "ui", "--host", "127.0.0.1", "--port", str(port)),
        *("--workers", "1", "--backend-store-uri", f"sqlite:///{folder / 'mlflow.db'}"),
    ]
    environment = os.environ | {
        # A third process of 240 MB that nothing here uses.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
        # MLflow's assistant runs shell commands for whoever reaches the port, and on a login node
        # that is every user of it: only in a container, where there is Docker.
        "MLFLOW_ENABLE_ASSISTANT_SANDBOX": "true",
    }
    for what, page in pages.items():
        print(f"MLflow UI, {what}: http://127.0.0.1:{port}{page}", flush=True)
    print("Ctrl-C ends it", flush=True)
    server = subprocess.Popen(command, env=environment)
    # TERM must end the server too, or it would outlive us and keep the port.
    signal.signal(signal.SIGTERM, lambda *_: server.terminate())
    try:
        server.wait()
    except KeyboardInterrupt:
        server.wait()


def print_plan(study: Path, results: Path) -> None:
    """Write the plan and print every stage directory with its state."""
    cells = load_study(study)
    check_outside(cells)
    plan = Plan(cells, results)
    changed = plan.write()
    states: dict[str, int] = {}
    for instance in plan.instances.values():
        directory = instance.directory(results)
        attempts = attempt_outcomes(directory)
        manifest = _manifest(directory)
        if manifest is not None:
            current = manifest["config"] == sha256(directory / CONFIG)
            state = "done" if current else "outdated"
        else:
            state = attempts[-1]["state"].lower() if attempts else "to do"
        states[state] = states.get(state, 0) + 1
        print(f"{state:<12} {len(attempts):>2} attempt(s)  {directory}")
    summary = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
    print(f"{study}: {len(plan.cells)} cells; {summary}; {changed} config file(s) written")
