"""Fixtures of the MLflow tests."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from abf.track.mlflow_records import IngestPlan
from abf.track.mlflow_store import ingest

os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"


@pytest.fixture(scope="session")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store: creating MLflow's tables takes seconds, so it is done once."""
    path = tmp_path_factory.mktemp("store") / "mlflow.db"
    ingest(
        IngestPlan("none", "none", [], path.parent),
        tracking_uri=f"sqlite:///{path}",
        artifact_root=path.parent / "artifacts",
    )
    return path
