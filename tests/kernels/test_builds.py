"""Every shipped configuration of `masked_loss` and `block_decode` compiles for A100 and H100."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROGRAM = """
import csv, sys
from dataclasses import asdict
from abf_kernels.ahead import report
from abf_kernels.masked_loss import builds as loss
from abf_kernels.block_decode import builds as decode
rows = [asdict(report(build)) for part in (loss, decode) for build in part.builds()]
writer = csv.DictWriter(sys.stdout, rows[0])
writer.writeheader()
writer.writerows(rows)
"""


def test_nothing_spills_and_everything_fits() -> None:
    # In a process of its own: here kernels are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(ROOT / "kernels"), environment.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert {row["operator"] for row in rows} == {"masked_loss", "block_decode"}
    assert {row["target"] for row in rows} == {"sm_80", "sm_90"}
    for row in rows:
        assert row["stack_bytes"] == "0", row
        assert int(row["shared_bytes"]) <= int(row["shared_limit"]), row
        assert int(row["blocks_per_multiprocessor"]) > 0, row
        if "bf16" in row["case"] and "merge" not in row["case"]:
            instruction = {"sm_80": "mma_sync", "sm_90": "wgmma"}[row["target"]]
            assert int(row[instruction]) > 0, row
            assert int(row["cp_async"]) > 0, row
