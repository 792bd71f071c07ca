"""Ingests that are killed, refused, or find the store or its disk unusable."""

from __future__ import annotations

import pickle
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from abf.errors import ArtifactError, LockError
from abf.files import lock
from abf.track.mlflow_points import Point
from abf.track.mlflow_records import IngestPlan
from abf.track.mlflow_store import BOOKKEEPING
from abf.track.mlflow_writer import ClientWriter, SqliteWriter, store_faults
from tests.track.cells import Store, make_cell, make_plan

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
    ("statement", "count"), [("BEGIN IMMEDIATE", 1), ("COMMIT", 1), ("COMMIT", 3), ("COMMIT", 7)]
)
def test_killed_ingest_is_completed_by_the_next(
    tmp_path: Path, template: Path, statement: str, count: int
):
    results = tmp_path / "results"
    plan = make_plan(results, make_cell(results, "a"), make_cell(results, "b"))
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
        assert f"{BOOKKEEPING}journal.train.offset" not in store.content()["a"]["tags"]
    store.ingest(plan)
    assert store.content() == clean.content()


def test_client_writer_resumes_after_points_without_offset(
    tmp_path: Path, template: Path, monkeypatch: pytest.MonkeyPatch
):
    """A tracking server commits points before tags: a kill between leaves points alone."""
    monkeypatch.setattr("abf.track.mlflow_store.sqlite_path", lambda uri: None)
    store = Store(tmp_path / "store", template)
    cell = make_cell(tmp_path / "results", "a")
    plan = make_plan(tmp_path / "results", cell)
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


def test_second_writer_is_refused(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    with lock(store.artifacts, "another ingest"), pytest.raises(LockError, match="another ingest"):
        store.ingest(IngestPlan("study", "grid", [], tmp_path))


def test_changed_parameter_is_named(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    cell = make_cell(tmp_path / "results", "a")
    store.ingest(make_plan(tmp_path / "results", cell))
    changed = replace(cell, params={"train.key1": "other"})
    with pytest.raises(ArtifactError, match=r"train\.key1 = '1'.*'other'"):
        store.ingest(make_plan(tmp_path / "results", changed))


def test_moved_project_is_refused(tmp_path: Path, template: Path):
    store = Store(tmp_path / "store", template)
    plan = make_plan(tmp_path / "results", make_cell(tmp_path / "results", "a"))
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
    plan = IngestPlan("study", "grid", [], root)
    ingest(plan, tracking_uri=uri, artifact_root=root / "artifacts")
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
        store.ingest(IngestPlan("study", "grid", [], tmp_path))
    assert f"store {tmp_path / 'mlflow.db'}: file is not a database" in str(caught.value)
    assert "move the file away" in str(caught.value)


def test_foreign_table_layout_is_refused(tmp_path: Path):
    import sqlite3

    with sqlite3.connect(tmp_path / "other.db") as connection:
        connection.execute("CREATE TABLE metrics (key TEXT, value REAL)")
    with pytest.raises(ArtifactError, match=r"table metrics has the columns \['key', 'value'\]"):
        SqliteWriter(tmp_path / "other.db")
