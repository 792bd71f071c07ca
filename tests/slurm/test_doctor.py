"""`abf doctor` against a real scheduler: what is wrong is named, with what is allowed instead."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from abf.grid import load_study
from abf.plan import Plan
from tests.slurm.box import Box
from tests.slurm.daemons import wait_for
from tests.slurm.jobs import attempts, submit, wait_attempts
from tests.slurm.micro import RUN, SITE
from tests.workflow.conftest import ROOT

ALLOCATION = "allocation: {node_hours: 90000, start: 2000-01-01, end: 2100-12-31}\n"
QOS = "boost_qos_bprod, boost_qos_dbg, boost_qos_lprod, normal, preemptible"
SALDO = """\
#!/bin/sh
test "$*" = -b || exit 64
cat <<'END'
--------------------------------------------------------------------------------------------------
account          start     end       total  localCluster  totConsumed  totConsumed  monthTotal  monthConsumed
                                 (local h) Consumed(local h) (local h)           %   (local h)      (local h)
--------------------------------------------------------------------------------------------------
euhpc_test    20000101  21001231   2880000        320000       320000         11.1      411428         {month}
END
"""  # noqa: E501


class Desk:
    """Where a new group member sits: a site file, a study, and the command."""

    def __init__(self, folder: Path, box: Box) -> None:
        self.folder, self.box = folder, box
        for name in ("work", "scratch"):
            (folder / name).mkdir()
        storage = "storage: {work: work, work_quota_gb: 100, scratch: scratch, purge_days: 40}\n"
        self.site = SITE + ALLOCATION + storage
        (folder / "run.yaml").write_text(RUN)
        os.symlink(ROOT / "workflow", folder / "workflow")
        self.env = box.env | {"ABF_SITE": str(folder / "site.yaml"), "OMP_NUM_THREADS": "1"}
        self.env.pop("HF_HUB_OFFLINE", None)

    def doctor(self, *arguments: str, site: str = "") -> subprocess.CompletedProcess[str]:
        """Run it, with lines added to the site file."""
        (self.folder / "site.yaml").write_text(self.site + site)
        return subprocess.run(
            [sys.executable, "-m", "abf.cli", "doctor", *arguments],
            cwd=self.folder, env=self.env, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip

    def command(self, name: str, text: str) -> None:
        """A command of this name on the path."""
        script = self.folder / "bin" / name
        script.parent.mkdir(exist_ok=True)
        script.write_text(text)
        script.chmod(0o755)
        self.env["PATH"] = f"{script.parent}{os.pathsep}{os.environ['PATH']}"


@pytest.fixture
def desk(box: Box, tmp_path: Path) -> Desk:
    return Desk(tmp_path, box)


def of(output: str, level: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith(level)]


def test_a_healthy_site_passes_and_its_limits_are_stored(desk: Desk) -> None:
    done = desk.doctor("run.yaml")
    assert done.returncode == 0, done.stdout
    assert of(done.stdout, "FAIL") == []
    assert "the scheduler takes the driver and a training on 2 node(s)" in done.stdout
    assert "MinJobAge=300 s >= 3 x 40" in done.stdout
    assert "node-hours left to euhpc_test (cap on billing)" in done.stdout
    stored = json.loads((desk.folder / "results/.driver/limits.json").read_text())
    assert stored["qos"]["boost_qos_dbg"]["max_minutes"] == 30
    assert stored["qos"]["boost_qos_dbg"]["per_user"] == {"gres/gpu": 8, "node": 2}
    assert stored["partitions"]["boost_usr_prod"]["node"] == {
        "billing": 32, "cpu": 32, "gres/gpu": 4, "mem": 494000, "node": 1,
    }  # fmt: skip
    assert stored["settings"]["MinJobAge"] == "300 sec"
    assert stored["site"]["account"] == "euhpc_test"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("account: nobodys", "'nobodys' is not one of root's: root may use euhpc_"),
        ("partition: nosuch", "partition='nosuch' does not exist; there are boost_usr_prod, lrd_a"),
        (
            "serial_partition: gone",
            "serial_partition='gone' does not exist; there are boost_usr_prod",
        ),
        ("qos: nosuch", f"qos='nosuch' does not exist; it may use {QOS}"),
        ("serial_qos: nosuch", f"serial_qos='nosuch' does not exist; it may use {QOS}"),
        ("qos: boost_qos_dbg", "max_minutes=1440 is longer than the 30 minutes of QOS boost_qos_d"),
        ("max_minutes: 1441", "max_minutes=1441 is longer than the 1440 minutes of partition boos"),
        ("qos: boost_qos_bprod", "QOS boost_qos_bprod is for at least 257 gres/gpu a job"),
        ("node: {gpus: 8}", "node.gpus=8, but boost_usr_prod has 4 a node"),
    ],
)
def test_what_would_be_refused_is_named_with_what_is_allowed(
    desk: Desk, wrong: str, message: str, books: Callable
) -> None:
    key = wrong.partition(":")[0]
    desk.site = "".join(
        line for line in desk.site.splitlines(keepends=True) if not line.startswith(f"{key}:")
    )
    done = desk.doctor("run.yaml", site=wrong + "\n")
    assert done.returncode == 1
    (failure,) = of(done.stdout, "FAIL")
    assert message in failure
    # Nothing was submitted, and the ledger knows of nothing.
    results = desk.folder / "results"
    planned = Plan(load_study(desk.folder / "run.yaml"), results).instances.values()
    assert books(*(results / instance.place for instance in planned)) == []


def test_a_partition_and_a_qos_that_are_both_wrong(desk: Desk) -> None:
    done = desk.doctor(site="partition: nosuch\nqos: gone\n")
    assert done.returncode == 1
    partition, qos = of(done.stdout, "FAIL")
    assert "partition='nosuch' does not exist" in partition
    assert "qos='gone' does not exist" in qos


def test_a_training_that_no_job_can_hold(desk: Desk) -> None:
    (desk.folder / "run.yaml").write_text(
        RUN.replace("nodes: 2, ranks_per_node: 4", "nodes: 3, ranks_per_node: 2")
    )
    site = "qos: boost_qos_dbg\nmax_minutes: 30\n"
    done = desk.doctor("run.yaml", site=site)
    assert done.returncode == 1
    (failure,) = of(done.stdout, "FAIL")
    assert "launch.nodes=3 of 2 training(s) (base/pretrain-" in failure
    assert "QOS boost_qos_dbg takes at most 2 nodes a job" in failure
    assert desk.doctor(site=site).returncode == 0


def test_a_qos_that_the_account_may_not_use(desk: Desk) -> None:
    names = QOS.replace(" ", "")
    change = ("sacctmgr", "-i", "modify", "account", "euhpc_test", "set")
    desk.box.run(*change, f"qos={names.replace('boost_qos_lprod,', '')}")
    try:
        done = desk.doctor(site="qos: boost_qos_lprod\n")
    finally:
        desk.box.run(*change, f"qos={names}")
    (failure,) = of(done.stdout, "FAIL")
    assert "qos='boost_qos_lprod' is not open to account euhpc_test" in failure
    assert "it may use boost_qos_bprod, boost_qos_dbg, normal, preemptible" in failure


def test_a_budget_that_is_used_up(desk: Desk) -> None:
    wait_attempts(desk.box, submit(desk.box, "sleep 5", "--exclusive"), "COMPLETED")
    change = ("sacctmgr", "-i", "modify", "account", "euhpc_test", "set")

    def left(billing: int) -> subprocess.CompletedProcess[str]:
        desk.box.run(*change, f"GrpTRESMins=billing={billing}")
        return desk.doctor("run.yaml")

    try:
        over, short = left(1), left(200_000)
        assert over.returncode == 1
        assert "no job will start" in over.stdout
        assert "allocation.node_hours=90,000, but the scheduler stops at 104" in short.stdout
        assert short.returncode == 0
        # What is left holds less than the five minutes on two nodes that a training reserves.
        used = json.loads(_usage(desk.box))
        waiting = left(used + 300)
        assert waiting.returncode == 1
        assert "a job of 2 node(s) reserves 0.2 and would wait for ever" in waiting.stdout
    finally:
        desk.box.run(*change, "GrpTRESMins=billing=172800000")


def _usage(box: Box) -> str:
    """Billing-minutes of the account, as Slurm counts them."""
    show = ("sshare", "-nP", "--accounts=euhpc_test", "--format=User,GrpTRESRaw")
    line = next(row for row in box.run(*show).stdout.splitlines() if row.startswith("|"))
    return dict(part.split("=") for part in line[1:].split(","))["billing"]


def test_the_sites_own_books(desk: Desk) -> None:
    desk.command("saldo", SALDO.format(month=500))
    done = desk.doctor()
    assert done.returncode == 0, done.stdout
    assert "80,000.0 of 90,000.0 node-hours left (2,880,000 core-hours / 32)" in done.stdout
    desk.command("saldo", SALDO.format(month=500_000))
    warned = desk.doctor()
    assert "this month 15,625.0 of 12,857.1 are used" in " ".join(of(warned.stdout, "WARN"))
    desk.command("saldo", SALDO.replace("euhpc_test", "another").format(month=0))
    done = desk.doctor()
    assert done.returncode == 1
    assert "`saldo -b` has no account 'euhpc_test'; it has another" in done.stdout


def test_the_debug_job_tells_what_a_node_sees(desk: Desk) -> None:
    done = desk.doctor("--job")
    assert done.returncode == 0, done.stdout
    # The box's GPUs are stand-ins, and it says so.
    (line,) = of(done.stdout, "WARN  job ")
    assert "(boost_qos_dbg) on lrdn000" in line
    assert "4 GPUs in CUDA_VISIBLE_DEVICES, torch 2." in line
    assert "no nvidia-smi there" in line
    job = line.split()[3]
    (row,) = wait_attempts(desk.box, job, "COMPLETED")
    assert "gres/gpu=4" in row["AllocTRES"]


def test_a_debug_job_whose_environment_is_broken(desk: Desk) -> None:
    done = desk.doctor("--job", site='setup: ["echo no such module >&2; exit 7"]\n')
    assert done.returncode == 1
    (failure,) = of(done.stdout, "FAIL")
    assert "ended as FAILED: no such module" in failure


def test_a_pause_that_makes_the_plugin_ask_sacct(desk: Desk) -> None:
    profile = desk.folder / "slow"
    profile.mkdir()
    line = "slurm-init-seconds-before-status-checks: 120\nslurm-status-command: squeue\n"
    (profile / "config.yaml").write_text(line)
    (failure,) = of(desk.doctor("--profile", "slow").stdout, "FAIL")
    assert "MinJobAge=300 s is less than 3 x" in failure
    assert "set it to at most 100" in failure


def test_an_accounting_that_is_down_is_named(desk: Desk) -> None:
    desk.box.stop_accounting()
    try:
        done = desk.doctor()
    finally:
        desk.box.start_accounting()
    assert done.returncode == 1
    (failure,) = of(done.stdout, "FAIL")
    assert "sacctmgr" in failure
    assert "try again when it is back" in failure
    wait_for("the accounting", lambda: attempts(desk.box, "1") is not None, seconds=30, every=0.5)


def test_a_results_folder_that_cannot_be_written(desk: Desk) -> None:
    done = desk.doctor("--results", "run.yaml")
    assert done.returncode == 1
    results, limits = of(done.stdout, "FAIL")
    assert "nothing can be written below" in results
    assert "cannot be stored below run.yaml" in limits
