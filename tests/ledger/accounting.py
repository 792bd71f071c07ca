"""A study, its site and the records that sacct would print of its jobs."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from abf.cluster.config import AllocationConfig, SiteConfig
from abf.cluster.history import _FIELDS
from abf.cluster.jobs import tag
from abf.cluster.slurm import SEPARATOR

NOW = int(time.time())
TODAY = datetime.fromtimestamp(NOW, UTC).date()
RUN = """
study: small
sources: [{kind: stdlib, pattern: "[a-f]*.py", max_documents: 16}]
tokenizer: {kind: trained, vocab_size: 400}
pack: {row_length: 64, max_block: 16}
base: {kind: pretrain, train: {objective: {kind: ar}, tokens: 2000, precision: fp32}}
train: {tokens: 2560, precision: fp32}
launch: {nodes: 2, minutes: 30}
tasks: {heldout: {kind: likelihood}}
"""
ALLOCATION = {"node_hours": 100.0, "start": TODAY - timedelta(10), "end": TODAY + timedelta(80)}
SITE = SiteConfig(
    account="euhpc_test", allocation=AllocationConfig(**ALLOCATION), poll_seconds=0.01
)


def line(**changes: Any) -> str:
    """A record as sacct prints it; by default a node for an hour, completed."""
    tres = "billing=32,cpu=32,gres/gpu=4,mem=494000M,node=1"
    values = dict.fromkeys(_FIELDS, "") | {
        "cluster": "leonardo", "job_id": "7", "user": "anna", "state": "COMPLETED",
        "name": f"{tag(Path('results'))}-x", "account": "euhpc_test",
        "submit": NOW - 7200, "start": NOW - 7200, "end": NOW - 3600,
        "elapsed": 3600, "limit": 1440, "tres": tres, "requested": tres,
        "energy": "0", "reason": "None", "exit_code": "0:0",
    }  # fmt: skip
    values |= {"shown_id": values["job_id"]} | changes
    assert values.keys() == _FIELDS.keys()
    return SEPARATOR.join(str(values[name]) for name in _FIELDS) + "\n"


def waiting(**changes: Any) -> str:
    state = {"state": "PENDING", "start": "Unknown", "end": "Unknown", "elapsed": 0, "tres": ""}
    return line(**(state | changes))
