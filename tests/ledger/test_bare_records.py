"""Records of a scheduler whose database lost what it was told of a job: known by the id alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from abf.cluster.config import NodeConfig
from abf.ledger.slurm import scheduled_rows
from tests.ledger.accounting import line


def test_a_job_without_a_comment_is_ours_by_its_id(
    tmp_path: Path, records: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "results" / "train" / "r-12345678"
    directory.mkdir(parents=True)
    (directory / "job.json").write_text(json.dumps({"job_id": "7", "name": "abf-train"}))
    monkeypatch.chdir(tmp_path)
    records(
        line(job_id="7", name="", comment="", elapsed=1800),
        line(job_id="8", name="", comment=""),  # a stranger's
        line(job_id="7", name="abf-else", comment="another's", submit=1),  # a reused id
    )
    (row,) = scheduled_rows(Path("results"), ["train/r-12345678"], node=NodeConfig())
    assert (row["job_id"], row["rule"], row["run"]) == ("7", "train", "r-12345678")
    assert row["elapsed_s"] == 1800
