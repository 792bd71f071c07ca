"""Fill MLflow from files, idempotently: journals, scores, attempts, references of a grid's cells.

MLflow mirrors files and is never the source of truth. Experiment = study, parent run = grid, child
run = cell. Ingesting twice gives the same database, and an ingest that is killed anywhere is
completed by the next one: a run is found by its tags, each journal's offset is stored with its
points, and everything else is compared before it is written.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from abf.errors import ArtifactError
from abf.files import atomic_path, lock
from abf.track.mlflow_costs import GROUP, Row, energy_source, figures, states
from abf.track.mlflow_points import (
    Point,
    clean_key,
    journal_name,
    read_new_points,
    score_points,
    to_csv,
)
from abf.track.mlflow_progress import Progress, charge
from abf.track.mlflow_records import (
    ATTEMPT_COLUMNS,
    Cell,
    IngestPlan,
    attempt_tags,
    cell_files,
    cell_note,
    clean_params,
    figure_files,
    files_digest,
    grid_note,
)
from abf.track.mlflow_view import experiment_tags
from abf.track.mlflow_writer import (
    ClientWriter,
    SqliteWriter,
    Writer,
    sqlite_path,
    store_faults,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run

BOOKKEEPING = "mlflow.abf."
"""Prefix of the tags in which an ingest notes how far it has come: MLflow's pages show no tags that
begin with `mlflow.`."""
PARAMS_A_BATCH = 100
"""Most parameters MLflow takes in one call."""


def ingest(plan: IngestPlan, *, tracking_uri: str, artifact_root: Path) -> dict[str, Any]:
    """Bring MLflow up to date with the files of a grid.

    Args:
        plan: study, grid and cells; cells that were never attempted are left out.
        tracking_uri: `sqlite:///path/to/mlflow.db`, or any URI of MLflow.
        artifact_root: folder of the copied small artifacts; its absolute path goes into the
            database of this machine and nowhere else.

    Returns:
        counts: runs, runs_created, points (added by this call), waiting (cells never attempted),
        and the experiment's id (see `abf.track.mlflow_view`).

    Raises:
        LockError: another ingest is writing.
        ArtifactError: the store belongs to another place or cannot be written, or a parameter of
            a run changed.
    """
    with (
        lock(artifact_root, f"MLflow ingest of study {plan.study}"),
        store_faults(tracking_uri),
    ):
        client = _open(tracking_uri)
        path = sqlite_path(tracking_uri)
        writer = ClientWriter(client) if path is None else SqliteWriter(path)
        try:
            return _Ingest(client, writer, plan, artifact_root).run()
        finally:
            writer.close()


def _open(tracking_uri: str) -> MlflowClient:
    # Usage statistics would leave this machine; a tracking store has no business doing that.
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    from mlflow import MlflowClient

    path = sqlite_path(tracking_uri)
    if path is not None and not path.exists():
        # Dozens of migrations make the tables, and MLflow cannot go on after half of them.
        with atomic_path(path) as temporary:
            MlflowClient(f"sqlite:///{temporary}", f"sqlite:///{temporary}").search_experiments()
    return MlflowClient(tracking_uri=tracking_uri, registry_uri=tracking_uri)


class _Ingest:
    """One pass over the cells, under the lock."""

    def __init__(
        self, client: MlflowClient, writer: Writer, plan: IngestPlan, artifact_root: Path
    ) -> None:
        self.client, self.writer, self.plan = client, writer, plan
        self.experiment = self._experiment(artifact_root)
        self.counts = {"runs": 0, "runs_created": 0, "points": 0, "waiting": 0}

    def run(self) -> dict[str, Any]:
        """Ingest every cell, then the parent, whose state sums them up."""
        self._run()
        return self.counts | {"experiment": self.experiment}

    def _run(self) -> None:
        found, shared = charge(
            self.plan.results,
            self.plan.rows,
            {cell.run: cell.stage_dirs for cell in self.plan.cells},
            driven=self.plan.driven,
        )
        begun = [(cell, p) for cell in self.plan.cells if (p := found[cell.run]) is not None]
        self.counts["waiting"] = len(self.plan.cells) - len(begun)
        everything = [*([shared] if shared else []), *(p for _, p in begun)]
        if not everything:
            return
        known = self._known_runs()
        start = min(p.start for p in everything)
        parent = known.get("") or self._create(self.plan.grid, start, {"abf.kind": "grid"})
        for cell, state in begun:
            tags = {
                "abf.kind": "cell",
                "abf.run": cell.run,
                "mlflow.parentRunId": parent.info.run_id,
            }
            run = known.get(cell.run) or self._create(cell.name, state.start, tags)
            self._cell(run, cell, state)
        self._parent(parent, shared, begun)

    def _experiment(self, artifact_root: Path) -> str:
        study = self.plan.study
        place = (artifact_root / re.sub(r"[^\w.-]", "_", study)).resolve().as_uri()
        found, tags = self.client.get_experiment_by_name(study), experiment_tags()
        if found is None:
            return self.client.create_experiment(study, artifact_location=place, tags=tags)
        if found.artifact_location != place:
            raise ArtifactError(
                f"the MLflow store keeps the artifacts of study {study!r} in "
                f"{found.artifact_location}, this run would keep them in {place}: the project "
                "folder was moved or copied. Move the store's database away and run again; it is "
                "filled from the journals"
            )
        if found.lifecycle_stage == "deleted":
            self.client.restore_experiment(found.experiment_id)
        for key, value in tags.items():
            if found.tags.get(key) != value:
                self.client.set_experiment_tag(found.experiment_id, key, value)
        return found.experiment_id

    def _known_runs(self) -> dict[str, Run]:
        """Runs of this grid by the key of their cell; the parent's key is empty."""
        known: dict[str, Run] = {}
        token = None
        while True:
            page = self.client.search_runs(
                [self.experiment], max_results=1000, page_token=token, order_by=["start_time ASC"]
            )
            for run in page:
                if run.data.tags.get("abf.grid") == self.plan.grid:
                    known.setdefault(run.data.tags.get("abf.run", ""), run)
            token = page.token
            if not token:
                return known

    def _create(self, name: str, start: int, tags: Mapping[str, str]) -> Run:
        self.counts["runs_created"] += 1
        return self.client.create_run(
            self.experiment,
            start_time=start,
            run_name=name,
            tags={
                "abf.grid": self.plan.grid,
                "mlflow.runName": name,
                "mlflow.source.name": "workflow/Snakefile",
                "mlflow.source.type": "LOCAL",
                **tags,
            },
        )

    def _cell(self, run: Run, cell: Cell, state: Progress) -> None:
        self.counts["runs"] += 1
        self._params(run, cell)
        for journal in cell.journals:
            self._journal(run, journal)
        missing, scores_csv = self._scores(run, cell)
        self._files(run, cell_files(cell, state, scores_csv))
        self._datasets(run, cell)
        tags = {clean_key(key): value for key, value in cell.tags.items()}
        tags |= attempt_tags(state) | {"mlflow.note.content": cell_note(cell, state, missing)}
        if "git_sha" in cell.tags:
            tags["mlflow.source.git.commit"] = cell.tags["git_sha"]
        self._tags(run, tags)
        self._cost(run, state.charged("run"), state.end)
        self._status(run, state.status, state.end)

    def _params(self, run: Run, cell: Cell) -> None:
        from mlflow.entities import Param

        wanted, have = clean_params(cell.params), run.data.params
        for key in wanted.keys() & have.keys():
            if wanted[key] != have[key]:
                raise ArtifactError(
                    f"run {cell.run} in MLflow has {key} = {have[key]!r}, its config says "
                    f"{wanted[key]!r}; delete the run in MLflow and ingest again"
                )
        new = [Param(key, value) for key, value in wanted.items() if key not in have]
        for i in range(0, len(new), PARAMS_A_BATCH):
            self.client.log_batch(run.info.run_id, params=new[i : i + PARAMS_A_BATCH])

    def _journal(self, run: Run, journal: Path) -> None:
        name = f"{BOOKKEEPING}journal.{journal_name(journal)}"
        tags = run.data.tags
        offset = int(tags.get(f"{name}.offset", 0))
        part = read_new_points(journal, offset=offset, tail=tags.get(f"{name}.tail", ""))
        if part.offset == offset and not part.rescanned:
            return
        points, last_step = part.points, int(tags.get(f"{name}.step", -1))
        # A resumed job cuts its journal and writes some steps again, with other times; and a
        # writer that is not atomic may have been killed before it set the offset.
        if not self.writer.atomic or any(point.step <= last_step for point in points):
            stored = self._stored(run, points)
            points = [point for point in points if (point.key, point.step) not in stored]
        step = max([last_step, *(point.step for point in part.points)])
        self.writer.write(
            run.info.run_id,
            points,
            {
                f"{name}.offset": str(part.offset),
                f"{name}.step": str(step),
                f"{name}.tail": part.tail,
            },
        )
        self.counts["points"] += len(points)

    def _stored(self, run: Run, points: list[Point]) -> set[tuple[str, int]]:
        keys = {point.key for point in points} & run.data.metrics.keys()
        return {
            (key, metric.step)
            for key in keys
            for metric in self.client.get_metric_history(run.info.run_id, key)
        }

    def _scores(self, run: Run, cell: Cell) -> tuple[list[str], bytes]:
        points: list[Point] = []
        missing: list[str] = []
        table = b""
        for name, directory in cell.stage_dirs.items():
            if name.split(".")[0] == "score":
                found, unmeasured, table = score_points(directory)
                points += found
                missing += unmeasured
        digest = files_digest({"scores": table, "points": repr(points).encode()}) if points else ""
        if run.data.tags.get(f"{BOOKKEEPING}scores", "") != digest:
            self.writer.write(run.info.run_id, points, {f"{BOOKKEEPING}scores": digest})
            self.counts["points"] += len(points)
        return missing, table

    def _files(self, run: Run, files: Mapping[str, bytes | Path]) -> None:
        digest = files_digest(files)
        if not files or run.data.tags.get(f"{BOOKKEEPING}files") == digest:
            return
        with tempfile.TemporaryDirectory(prefix="abf-mlflow-") as folder:
            for name, content in files.items():
                target = Path(folder) / name
                target.parent.mkdir(exist_ok=True)
                data = content.read_bytes() if isinstance(content, Path) else content
                target.write_bytes(data)
            self.client.log_artifacts(run.info.run_id, folder)
        self.writer.write(run.info.run_id, [], {f"{BOOKKEEPING}files": digest})

    def _datasets(self, run: Run, cell: Cell) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        inputs = run.inputs.dataset_inputs if run.inputs else []
        have = {(i.dataset.name, i.dataset.digest) for i in inputs}
        new = [
            DatasetInput(
                Dataset(
                    name=ref.name,
                    digest=ref.sha256[:36],
                    source_type="local",
                    source=str(ref.path),
                ),
                tags=[InputTag("mlflow.data.context", ref.context)],
            )
            for ref in cell.datasets
            if (ref.name, ref.sha256[:36]) not in have
        ]
        if new:
            self.client.log_inputs(run.info.run_id, new)

    def _tags(self, run: Run, tags: Mapping[str, str]) -> None:
        new = {key: value for key, value in tags.items() if run.data.tags.get(key) != value}
        if new:
            self.writer.write(run.info.run_id, [], new)

    def _cost(self, run: Run, rows: Sequence[Row], time: int) -> None:
        """Costs so far, one value a metric: a later ingest replaces them."""
        points = [Point(key, value, time, 0) for key, value in figures(rows).items()]
        self.writer.settle(run.info.run_id, GROUP, points)

    def _status(self, run: Run, status: str, end: int) -> None:
        if run.info.status == status and (status == "RUNNING" or run.info.end_time == end):
            return
        if status == "RUNNING":
            self.client.update_run(run.info.run_id, status=status)
        else:
            self.client.set_terminated(run.info.run_id, status, end)

    def _parent(
        self, parent: Run, shared: Progress | None, begun: Sequence[tuple[Cell, Progress]]
    ) -> None:
        waiting = self.counts["waiting"]
        rows: list[Row] = [{**row, "cell": ""} for row in (shared.rows if shared else ())]
        rows += [
            {**row, "cell": cell.name} for cell, found in begun for row in found.charged("run")
        ]
        table = to_csv(("cell", *ATTEMPT_COLUMNS), rows)
        self._files(parent, {"attempts.csv": table, **figure_files(self.plan.figures)})
        everything = [*([shared] if shared else []), *(found for _, found in begun)]
        statuses = {found.status for found in everything}
        done = not waiting and statuses == {"FINISHED"}
        failed = "FAILED" in statuses or not (self.plan.driven or "RUNNING" in statuses)
        status = "FINISHED" if done else "FAILED" if failed else "RUNNING"
        end = max(found.end for found in everything)
        tags = {
            "abf.cells": str(len(self.plan.cells)),
            "abf.attempt_states": states(rows),
            "abf.energy_source": energy_source(rows),
            "mlflow.note.content": grid_note(self.plan, rows, waiting),
        }
        self._tags(parent, tags)
        self._cost(parent, rows, end)
        self._status(parent, status, end)
