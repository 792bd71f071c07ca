"""Ingest into a real sqlite store, read back through MlflowClient."""

from __future__ import annotations

import json
import math
import os
import pickle
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from abf.artifacts import SCORES, write_table
from abf.errors import ArtifactError, LockError
from abf.files import lock
from abf.track.attempts import ATTEMPTS
from abf.track.journal import Journal
from abf.track.mlflow_points import Point
from abf.track.mlflow_records import Cell, DatasetRef, IngestPlan
from abf.track.mlflow_store import ingest, runs_page
from abf.track.mlflow_writer import ClientWriter, SqliteWriter, store_faults

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
STEPS = 40


def write_attempts(directory: Path, states: list[str], start: float = 1.7e9) -> None:
    """Attempts of 60 s each, one after the other, with these end states."""
    directory.mkdir(parents=True, exist_ok=True)
    lines = []
    for number, state in enumerate(states, start=1):
        record: dict[str, Any] = {
            "attempt": number,
            "job_id": f"{directory.parent.name}-{directory.name}-{number}",
            "host": socket.gethostname(),
            "pid": 2**22 + 1,
            "pid_start": start,
            "rule": directory.parent.name,
            "run": directory.name,
            "cores": 2,
            "gpus": 0,
            "start": start,
            "state": "RUNNING",
        }
        lines.append(record)
        reason = "boom" if state == "FAILED" else ""
        closing = {"state": state, "end": start + 60, "elapsed_s": 60.0, "reason": reason}
        lines.append(record | closing)
        start += 100
    (directory / ATTEMPTS).write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_steps(journal: Journal, first: int, last: int) -> None:
    for step in range(first, last + 1):
        journal.metrics(step, step * 4096, {"loss": 5 / step, "lr": 1e-3 * step}, step * 0.1)


def write_scores(directory: Path, run: str) -> None:
    common = {"run": run, "arm": "fixed", "seed": 0, "task_version": 1, "note": ""}
    rows = [
        common
        | {
            "task": "likelihood",
            "decoder": "",
            "metric": "ar_bits_per_byte",
            "unit": "bits/byte",
            "value": 2.5,
            "ci_low": 2.4,
            "ci_high": 2.6,
            "interval": "documents",
            "n": 7,
        },
        common
        | {
            "task": "continuation",
            "decoder": "threshold",
            "metric": "joules_per_token",
            "unit": "J",
            "value": None,
            "ci_low": None,
            "ci_high": None,
            "interval": "none",
            "n": 0,
        },
    ]
    table = pa.Table.from_pylist(rows, schema=SCORES)
    write_table(directory / "scores.parquet", table, SCORES)
    os.utime(directory / "scores.parquet", (1.7e9 + 500, 1.7e9 + 500))
    (directory / "manifest.json").write_text("{}")


def make_cell(root: Path, run: str, *, finished: bool = True) -> Cell:
    train, score = root / "train" / run, root / "score" / run
    write_attempts(train, ["FAILED", "COMPLETED"] if finished else ["FAILED"])
    with Journal(train / "journal.jsonl") as journal:
        write_steps(journal, 1, STEPS)
    if finished:
        (train / "manifest.json").write_text("{}")
        write_attempts(score, ["COMPLETED"], start=1.7e9 + 400)
        write_scores(score, run)
    figure = root / "curve.svg"
    figure.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>")
    return Cell(
        run=run,
        name="fixed seed 0",
        params={f"train.key{i}": str(i) for i in range(150)},
        tags={"config_hash": "ab12", "git_sha": "0" * 40, "arm": "fixed", "seed": "0"},
        stage_dirs={"train": train, "score": score},
        journals=[train / "journal.jsonl"],
        figures=[figure],
        artifacts=[("model", root / "model.safetensors", "ff" * 32, 123)],
        datasets=[DatasetRef("packed-fixed", root / "packed", "ee" * 32)],
    )


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store: creating MLflow's tables takes seconds, so it is done once."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    ingest(
        IngestPlan("none", "none", []),
        tracking_uri=f"sqlite:///{path}",
        artifact_root=path.parent / "artifacts",
    )
    return path


class Store:
    def __init__(self, root: Path, template: Path) -> None:
        root.mkdir(parents=True, exist_ok=True)
        (root / "mlflow.db").write_bytes(template.read_bytes())
        self.uri = f"sqlite:///{root / 'mlflow.db'}"
        self.artifacts = root / "artifacts"

    def ingest(self, plan: IngestPlan) -> dict[str, Any]:
        return ingest(plan, tracking_uri=self.uri, artifact_root=self.artifacts)

    def content(self) -> dict[str, Any]:
        """Everything in the store but what differs by chance: run ids and their folders."""
        from mlflow import MlflowClient

        client = MlflowClient(tracking_uri=self.uri)
        experiment = client.get_experiment_by_name("study")
        assert experiment is not None
        runs = list(client.search_runs([experiment.experiment_id]))
        names = {run.info.run_id: run.data.tags.get("abf.run", "grid") for run in runs}
        content = {}
        for run in runs:
            key = names[run.info.run_id]
            assert key not in content, "one run a cell"
            tags = dict(run.data.tags)
            if "mlflow.parentRunId" in tags:
                tags["mlflow.parentRunId"] = names[tags["mlflow.parentRunId"]]
            assert run.info.artifact_uri is not None
            assert run.inputs is not None
            folder = Path(run.info.artifact_uri.removeprefix("file://"))
            content[key] = {
                "info": (run.info.status, run.info.start_time, run.info.end_time),
                "params": dict(run.data.params),
                "tags": tags,
                "latest": dict(run.data.metrics),
                "metrics": {
                    name: sorted(
                        (m.step, m.timestamp, m.value)
                        for m in client.get_metric_history(run.info.run_id, name)
                    )
                    for name in run.data.metrics
                },
                "inputs": [
                    (i.dataset.name, i.dataset.digest, [(t.key, t.value) for t in i.tags])
                    for i in run.inputs.dataset_inputs
                ],
                "files": {
                    path.relative_to(folder).as_posix(): path.read_bytes()
                    for path in sorted(folder.rglob("*"))
                    if path.is_file()
                },
            }
        return content


def test_read_back(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    plan = IngestPlan(
        "study",
        "grid",
        [
            make_cell(tmp_path / "results", "fixed-0"),
            make_cell(tmp_path / "results", "fixed-1", finished=False),
            replace(make_cell(tmp_path / "results", "x"), run="none", stage_dirs={}, journals=[]),
        ],
        figures=[tmp_path / "results" / "curve.svg"],
    )
    counts = store.ingest(plan)
    expected = {"runs": 2, "runs_created": 3, "points": 2 * 3 * STEPS + 3, "waiting": 1}
    assert counts == expected | {"experiment": counts["experiment"]}

    content = store.content()
    assert sorted(content) == ["fixed-0", "fixed-1", "grid"]
    done, failed, grid = content["fixed-0"], content["fixed-1"], content["grid"]

    loss = done["metrics"]["train/loss"]
    assert [step for step, _, _ in loss] == list(range(1, STEPS + 1))
    assert [value for _, _, value in loss] == [5 / step for step in range(1, STEPS + 1)]
    journal = plan.cells[0].journals[0]
    times = [round(json.loads(line)["time"] * 1000) for line in journal.read_text().splitlines()]
    assert [time for _, time, _ in loss] == times
    assert done["latest"]["train/loss"] == 5 / STEPS
    assert done["latest"]["train/tokens"] == STEPS * 4096

    assert done["latest"]["likelihood/ar_bits_per_byte"] == 2.5
    assert done["latest"]["interval/likelihood/ar_bits_per_byte_ci_low"] == 2.4
    assert done["latest"]["interval/likelihood/ar_bits_per_byte_ci_high"] == 2.6
    assert not any("joules" in name for name in done["latest"])
    assert (
        "Not measured: continuation/threshold/joules_per_token"
        in (done["tags"]["mlflow.note.content"])
    )

    assert len(done["params"]) == 150
    tags = done["tags"]
    assert tags["config_hash"] == "ab12"
    assert tags["mlflow.source.git.commit"] == "0" * 40
    assert tags["mlflow.runName"] == "fixed seed 0"
    assert tags["mlflow.parentRunId"] == "grid"
    assert tags["abf.attempts"] == "3"
    assert tags["abf.failed_attempts"] == "1"
    assert float(tags["abf.core_hours"]) == pytest.approx(3 * 2 * 60 / 3600)
    assert tags["abf.job_ids"] == "train-fixed-0-1 train-fixed-0-2 score-fixed-0-1"
    assert int(tags["abf.journal.train.offset"]) == journal.stat().st_size
    assert tags["attempts.train"] == "FAILED 60.0 s (boom), COMPLETED 60.0 s"

    assert done["info"] == ("FINISHED", 1_700_000_000_000, 1_700_000_460_000)
    assert failed["info"][0] == "FAILED"
    assert grid["info"][0] == "FAILED"
    assert list(grid["files"]) == ["figures/curve.svg"]
    assert "3 cells, 1 not begun" in grid["tags"]["mlflow.note.content"]
    assert done["inputs"] == [
        ("packed-fixed", ("ee" * 32)[:36], [("mlflow.data.context", "train")])
    ]
    assert sorted(done["files"]) == [
        "attempts.csv",
        "figures/curve.svg",
        "references.json",
        "scores.csv",
    ]
    (reference,) = json.loads(done["files"]["references.json"])
    assert reference["sha256"] == "ff" * 32
    assert reference["bytes"] == 123
    assert len(done["files"]["attempts.csv"].splitlines()) == 1 + 3


def test_twice_is_once_and_a_finished_cell_is_completed_later(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    results = tmp_path / "results"
    plan = IngestPlan("study", "grid", [make_cell(results, "a", finished=False)])
    store.ingest(plan)
    first = store.content()
    assert store.ingest(plan)["points"] == 0
    assert store.content() == first

    # The same cell, finished; a second cell joins the grid and reuses the parent.
    plan = IngestPlan("study", "grid", [make_cell(results, "a"), make_cell(results, "b")])
    assert store.ingest(plan)["runs_created"] == 1
    content = store.content()
    assert content["a"]["info"][0] == "FINISHED"
    assert content["grid"]["info"][0] == "FINISHED"


def test_cut_and_replayed_journal_adds_no_step_twice(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    cell = make_cell(tmp_path / "results", "a")
    plan = IngestPlan("study", "grid", [cell])
    store.ingest(plan)
    before = store.content()["a"]["metrics"]
    with Journal(cell.journals[0]) as journal:
        journal.cut(STEPS - 15)
    store.ingest(plan)
    assert store.content()["a"]["metrics"] == before
    with Journal(cell.journals[0]) as journal:
        write_steps(journal, STEPS - 14, STEPS + 10)
    store.ingest(plan)
    metrics = store.content()["a"]["metrics"]
    assert [step for step, _, _ in metrics["train/loss"]] == list(range(1, STEPS + 11))
    assert metrics["train/loss"][:STEPS] == before["train/loss"]


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from abf.track import mlflow_store
from abf.track.mlflow_writer import SqliteWriter

plan, uri, artifacts, statement, count = pickle.loads(Path(sys.argv[1]).read_bytes())


class Connection:
    # Dies by kill -9 right before the count-th statement of this kind.
    def __init__(self, inner):
        self.inner, self.left = inner, count

    def execute(self, sql, *rest):
        if sql == statement:
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.inner.execute(sql, *rest)

    def __getattr__(self, name):
        return getattr(self.inner, name)


begin = SqliteWriter.__init__


def wrapped(self, path):
    begin(self, path)
    self._connection = Connection(self._connection)


SqliteWriter.__init__ = wrapped
mlflow_store.ingest(plan, tracking_uri=uri, artifact_root=artifacts)
"""


@pytest.mark.parametrize(
    ("statement", "count"), [("BEGIN IMMEDIATE", 1), ("COMMIT", 1), ("COMMIT", 3), ("COMMIT", 6)]
)
def test_killed_ingest_is_completed_by_the_next(
    tmp_path: Path, template: Path, statement: str, count: int
):
    results = tmp_path / "results"
    plan = IngestPlan("study", "grid", [make_cell(results, "a"), make_cell(results, "b")])
    clean = Store(tmp_path / "clean", template)
    clean.ingest(plan)
    store = Store(tmp_path / "store", template)
    arguments = tmp_path / "arguments"
    arguments.write_bytes(pickle.dumps((plan, store.uri, store.artifacts, statement, count)))
    run = subprocess.run(
        [sys.executable, "-c", KILLED, str(arguments)], capture_output=True, check=False
    )
    assert run.returncode == -signal.SIGKILL, run.stderr.decode()
    if count == 1:
        assert store.content()["a"]["metrics"] == {}
        assert "abf.journal.train.offset" not in store.content()["a"]["tags"]
    store.ingest(plan)
    assert store.content() == clean.content()


def test_both_writers_give_the_same_store(tmp_path: Path, template: Path):
    from mlflow import MlflowClient

    points = [
        *(Point("loss", 1 / step, 1000 + step, step) for step in range(1, 2000)),
        Point("late", 1.0, 50, 3),
        Point("late", 2.0, 40, 3),
        Point("nan", math.nan, 1, 0),
        Point("inf", -math.inf, 1, 0),
    ]
    found = []
    for kind in ("sqlite", "client"):
        store = Store(tmp_path / kind, template)
        client = MlflowClient(tracking_uri=store.uri)
        experiment = client.create_experiment("study", artifact_location="file:///nowhere")
        run = client.create_run(experiment, start_time=1, run_name="a").info.run_id
        path = tmp_path / kind / "mlflow.db"
        writer = SqliteWriter(path) if kind == "sqlite" else ClientWriter(client)
        writer.write(run, points, {"a": "1"})
        writer.write(run, [*points[:10], Point("late", 9.0, 60, 2)], {"a": "2", "b": "3"})
        writer.close()
        content = store.content()["grid"]
        content["latest"]["nan"] = repr(content["latest"]["nan"])
        content["metrics"]["nan"] = repr(content["metrics"]["nan"])
        found.append(content)
    assert found[0] == found[1]
    assert found[0]["latest"]["late"] == 1.0


def test_client_writer_resumes_after_points_without_offset(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
):
    """A tracking server commits points before tags: a kill between leaves points alone."""
    monkeypatch.setattr("abf.track.mlflow_store.sqlite_path", lambda uri: None)
    store = Store(tmp_path / "store", template)
    cell = make_cell(tmp_path / "results", "a")
    plan = IngestPlan("study", "grid", [cell])
    with monkeypatch.context() as patch:

        def points_only(self: ClientWriter, run_id: str, points: Any, tags: Any) -> None:
            from mlflow.entities import Metric

            self._client.log_batch(run_id, metrics=[Metric(*p) for p in points[:50]])
            raise KeyboardInterrupt

        patch.setattr(ClientWriter, "write", points_only)
        with pytest.raises(KeyboardInterrupt):
            store.ingest(plan)
    store.ingest(plan)
    monkeypatch.undo()
    clean = Store(tmp_path / "clean", template)
    clean.ingest(plan)
    assert store.content() == clean.content()


def test_address_of_the_runs():
    assert runs_page("3") == (
        "/#/experiments/3/runs?workflowType=machine_learning&orderByKey=attributes.run_name"
        "&orderByAsc=true&searchFilter=tags.%60abf.kind%60%20%3D%20%22cell%22"
    )


def test_second_writer_is_refused(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    with lock(store.artifacts, "another ingest"), pytest.raises(LockError, match="another ingest"):
        store.ingest(IngestPlan("study", "grid", []))


def test_changed_parameter_is_named(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    cell = make_cell(tmp_path / "results", "a")
    store.ingest(IngestPlan("study", "grid", [cell]))
    changed = replace(cell, params={"train.key1": "other"})
    with pytest.raises(ArtifactError, match=r"train\.key1 = '1'.*'other'"):
        store.ingest(IngestPlan("study", "grid", [changed]))


def test_moved_project_is_refused(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    plan = IngestPlan("study", "grid", [make_cell(tmp_path / "results", "a")])
    store.ingest(plan)
    store.artifacts = tmp_path / "elsewhere"
    with pytest.raises(ArtifactError, match="moved or copied"):
        store.ingest(plan)


FULL = """
import resource, sys
from pathlib import Path
from abf.errors import ArtifactError
from abf.track.mlflow_records import IngestPlan
from abf.track.mlflow_store import ingest

resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
root = Path(sys.argv[1])
try:
    uri = f"sqlite:///{root / 'mlflow.db'}"
    ingest(IngestPlan("study", "grid", []), tracking_uri=uri, artifact_root=root / "artifacts")
except ArtifactError as error:
    print(error)
"""


def test_store_that_does_not_fit_on_the_disk_is_not_begun(tmp_path: Path):
    """MLflow cannot go on after half of its migrations: the next ingest must find none."""
    run = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert f"MLflow's store {tmp_path / 'mlflow.db'}: disk I/O error" in run.stdout, run.stderr
    assert "free space" in run.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["artifacts"]


def test_disk_that_fills_up_while_points_are_written(tmp_path: Path, template: Path):
    store = Store(tmp_path, template)
    writer = SqliteWriter(tmp_path / "mlflow.db")
    writer._connection.execute("PRAGMA max_page_count = 1")  # what is there, and no page more
    with pytest.raises(ArtifactError) as caught, store_faults(store.uri):
        writer.write("run", [Point("loss", 1.0, 0, step) for step in range(50_000)], {})
    writer.close()
    assert f"store {tmp_path / 'mlflow.db'}: database or disk is full; free" in str(caught.value)
    assert "run the same command again" in str(caught.value)


def test_damaged_store_is_named_through_mlflow(tmp_path: Path, template: Path):
    store = Store(tmp_path, template)
    (tmp_path / "mlflow.db").write_bytes(b"no database " * 1000)
    with pytest.raises(ArtifactError) as caught:
        store.ingest(IngestPlan("study", "grid", []))
    assert f"store {tmp_path / 'mlflow.db'}: file is not a database" in str(caught.value)
    assert "move the file away" in str(caught.value)


def test_foreign_table_layout_is_refused(tmp_path: Path):
    import sqlite3

    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE metrics (key TEXT, value REAL)")
    with pytest.raises(ArtifactError, match=r"table metrics has the columns \['key', 'value'\]"):
        SqliteWriter(tmp_path / "other.db")
