"""Which jobs of Snakemake's are tried again: what was ended from outside, not what failed."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.slurm.box import Box
from tests.slurm.daemons import processes, wait_for
from tests.slurm.micro import RUN, Study
from tests.slurm.test_profile_run import Site


@pytest.fixture
def site(box: Box, prepared: Study, tmp_path: Path) -> Iterator[Site]:
    """A user whose data, base model and trained model are made."""
    shutil.copytree(prepared.folder, tmp_path / "user", copy_function=shutil.copy2)
    found = Site(tmp_path / "user", box)
    done = found.call(*found.snakemake("--until", "train"))
    assert done.returncode == 0, done.stdout[-5000:]
    yield found
    found.end()


def ended(site: Site, *states: str) -> None:
    """Wait until the accounting has these decoding jobs, in this order, and no others."""

    def written() -> bool:
        rows = [row for row in site.jobs() if row["Comment"].startswith("rule_decode")]
        return [row["State"] for row in sorted(rows, key=lambda r: int(r["JobIDRaw"]))] == [*states]

    wait_for(f"decodes {states}", written, seconds=30, every=0.5)


def at_work(box: Box) -> list[psutil.Process]:
    """Decoding processes on the nodes."""
    found = []
    for pid, _ in processes(box.root):
        try:
            if psutil.Process(pid).cmdline()[1:4] == ["-m", "abf.cli", "decode"]:
                found.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    return found


def test_what_was_ended_is_tried_again_and_a_refusal_is_not(site: Site) -> None:
    process = site.start(*site.snakemake("--until", "decode"))
    wait_for("a decode", lambda: bool(at_work(site.box)), seconds=120, every=0.05)
    (lost,) = at_work(site.box)
    # As a node does it that fails: no word is left. (A time limit, which takes minutes, was tried.)
    lost.kill()
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output[-5000:]
    ended(site, "FAILED", "COMPLETED")

    # What a finished training was made from is gone: made again before a decode that reads it.
    shutil.rmtree(site.folder / "results" / site.plan()["cells"][0]["packed"])
    (site.folder / "run.yaml").write_text(RUN.replace("prompts: 2", "prompts: 1"))
    done = site.call(*site.snakemake("--until", "decode"))
    assert done.returncode == 0, done.stdout[-5000:]
    ended(site, "FAILED", "COMPLETED", "COMPLETED")

    # More prompts than there are held-out documents: only the job can know.
    (site.folder / "run.yaml").write_text(RUN.replace("prompts: 2", "prompts: 5000"))
    done = site.call(*site.snakemake("--until", "decode"))
    assert done.returncode != 0
    assert "prompts=5000: only" in done.stdout, done.stdout[-5000:]
    ended(site, "FAILED", "COMPLETED", "COMPLETED", "FAILED")
