"""The cluster in a box does what Leonardo is known to do, and survives what breaks there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.slurm.box import NODES, Box
from tests.slurm.daemons import BoxError, processes, wait_for
from tests.slurm.jobs import attempts, show, submit, wait_attempts, wait_state
from tests.slurm.owner import Owner, remove_orphans


def table(box: Box, *argv: str) -> dict[str, list[str]]:
    """Rows of a |-separated listing by their first column."""
    lines = box.run(*argv).stdout.splitlines()
    return {first: rest for first, *rest in (line.split("|") for line in lines)}


def test_nodes_partitions_and_limits_are_leonardos(box: Box) -> None:
    nodes = table(box, "sinfo", "--noheader", "--Node", "--format=%N|%c|%m|%G|%P")
    gpu = ["32", "494000", "gpu:a100:4", "boost_usr_prod"]
    serial = ["4", "30800", "(null)", "lrd_all_serial*"]
    assert nodes == {name: serial if name == "serial01" else gpu for name in NODES}
    longest = table(box, "sinfo", "--noheader", "--format=%P|%l")
    assert longest == {"boost_usr_prod": ["1-00:00:00"], "lrd_all_serial*": ["4:00:00"]}
    columns = "name,maxwall,maxtres,maxtrespu,mintres,flags"
    limits = table(box, "sacctmgr", "--noheader", "--parsable2", "show", "qos", f"format={columns}")
    assert limits == {
        "normal": ["", "node=64", "", "", "DenyOnLimit"],
        "boost_qos_dbg": ["00:30:00", "node=2", "gres/gpu=8,node=2", "", "DenyOnLimit"],
        "boost_qos_bprod": ["1-00:00:00", "node=256", "", "gres/gpu=257", "DenyOnLimit"],
        "boost_qos_lprod": ["4-00:00:00", "node=3", "", "", "DenyOnLimit"],
        "preemptible": ["", "", "", "", "DenyOnLimit"],
    }


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--qos=boost_qos_bprod", "--nodes=2", "--gres=gpu:4"], "QOSMinGRES"),
        (["--qos=boost_qos_dbg", "--time=60"], "QOSMaxWallDurationPerJobLimit"),
        (["--qos=boost_qos_lprod", "--nodes=4"], "QOSMaxNodePerJobLimit"),
        (["--time=25:00:00"], "Requested time limit is invalid"),
        (["--account=nobodys"], "Invalid account or account/partition combination specified"),
        (["--account=root"], "Invalid account or account/partition combination specified"),
        (["--qos=nosuch"], "Invalid qos specification"),
        (["--partition=nosuch"], "invalid partition specified: nosuch"),
        (["--mem=494001"], "Memory specification can not be satisfied"),
        (["--gres=gpu:5"], "Requested node configuration is not available"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_cannot_run_is_refused_with_its_reason(
    box: Box, options: list[str], message: str
) -> None:
    with pytest.raises(BoxError, match=message):
        submit(box, "true", *options)


@pytest.mark.parametrize(
    ("options", "billing"),
    [
        (["--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8", "--gres=gpu:4"], "64"),
        (["--nodes=2", "--exclusive", "--mem=0"], "64"),
        (["--gres=gpu:1", "--cpus-per-task=8"], "8"),
        (["--gres=gpu:4"], "32"),
        (["--mem=247000"], "15"),
        (["--partition=lrd_all_serial"], "0"),
    ],
)
def test_billing_is_the_largest_share_of_a_node(box: Box, options: list[str], billing: str) -> None:
    job = submit(box, "true", *options)
    row = wait_attempts(box, job, "COMPLETED")[0]
    resources = dict(pair.split("=") for pair in row["AllocTRES"].split(","))
    assert resources.get("billing", "0") == billing


def test_each_rank_has_its_node_and_gpu_without_any_configuration(box: Box, tmp_path: Path) -> None:
    # Like the Snakemake job step, which drops SLURM_CONF and the geometry.
    strip = (
        'for v in $(env | grep -o "^SLURM_[A-Z_]*"); do [ $v = SLURM_JOB_ID ] || unset $v; done; '
    )
    rank = "echo $SLURM_PROCID $SLURMD_NODENAME $(hostname) $CUDA_VISIBLE_DEVICES "
    rank += '$(getent hosts $(hostname) | cut -d" " -f1)'
    flags = "--mpi=none --nodes=2 --ntasks=8 --ntasks-per-node=4 --gpus-per-task=1"
    job = submit(
        box,
        f"{strip} env | grep SLURM_CONF; srun {flags} sh -c '{rank}'",
        *("--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=8", "--gres=gpu:4"),
        *("--nodelist=lrdn[0001-0002]", f"--output={tmp_path}/log"),
    )
    wait_state(box, job, "COMPLETED")
    ranks = sorted((tmp_path / "log").read_text().splitlines())
    place = [f"lrdn000{1 + n // 4} lrdn000{1 + n // 4} {n % 4} 127.0.0.1" for n in range(8)]
    assert ranks == [f"{n} {text}" for n, text in enumerate(place)]


def test_a_cancelled_job_is_cancelled_in_both_books(box: Box) -> None:
    job = submit(box, "sleep 300")
    wait_state(box, job, "RUNNING")
    box.run("scancel", job)
    assert wait_attempts(box, job, "CANCELLED")[0]["State"] == "CANCELLED by 0"
    assert show(box, job)["JobState"] == "CANCELLED"


def test_requeue_keeps_the_id_and_both_attempts_are_on_record(box: Box) -> None:
    job = submit(box, 'test "$SLURM_RESTART_COUNT" = 1 || sleep 300')
    wait_state(box, job, "RUNNING")
    box.run("scontrol", "requeue", job)
    wait_state(box, job, "PENDING")
    assert wait_state(box, job, "COMPLETED")["Restarts"] == "1"
    first, second = wait_attempts(box, job, "REQUEUED", "COMPLETED")
    assert first["JobID"] == second["JobID"] == job
    assert first["Submit"] < second["Submit"]
    assert first["End"] <= second["Start"]


def test_preemption_requeues_the_weaker_job(box: Box) -> None:
    whole = ("--nodes=2", "--exclusive", "--mem=0", "--nodelist=lrdn[0003-0004]")
    command = 'test "$SLURM_RESTART_COUNT" = 1 || sleep 300'
    weak = submit(box, command, "--qos=preemptible", *whole)
    wait_state(box, weak, "RUNNING")
    strong = submit(box, "sleep 1", "--qos=boost_qos_dbg", *whole)
    wait_attempts(box, strong, "COMPLETED")
    wait_attempts(box, weak, "PREEMPTED", "COMPLETED", seconds=60)


def test_a_dead_node_fails_the_job_and_requeues_it(box: Box, tmp_path: Path) -> None:
    beat = f"while sleep 0.2; do date > {tmp_path}/$SLURM_RESTART_COUNT$SLURMD_NODENAME; done"
    command = f"test \"$SLURM_RESTART_COUNT\" = 1 || srun --mpi=none sh -c '{beat}'"
    job = submit(box, command, "--nodes=2", "--ntasks=2", "--requeue")
    nodes = wait_state(box, job, "RUNNING")["NodeList"]
    _, victim = box.run("scontrol", "show", "hostnames", nodes).stdout.split()
    heart = tmp_path / victim
    wait_for(f"life on {victim}", heart.exists)
    box.kill_node(victim)
    last = heart.stat().st_mtime_ns
    try:
        wait_attempts(box, job, "NODE_FAIL", "COMPLETED", seconds=90)
        assert heart.stat().st_mtime_ns == last  # no process outlives its node
    finally:
        box.start_node(victim)


def test_a_controller_restart_keeps_running_and_waiting_jobs(box: Box, tmp_path: Path) -> None:
    running = submit(box, f"while [ ! -e {tmp_path}/go ]; do sleep 0.1; done")
    held = submit(box, "true", "--hold")
    wait_state(box, running, "RUNNING")
    box.restart_controller()
    assert show(box, running)["JobState"] == "RUNNING"
    assert show(box, held)["JobState"] == "PENDING"
    (tmp_path / "go").touch()
    box.run("scontrol", "release", held)
    for job in (running, held):
        wait_attempts(box, job, "COMPLETED")


def test_nothing_is_lost_while_the_accounting_is_down(box: Box) -> None:
    before = submit(box, "sleep 2")
    box.stop_accounting()
    during = submit(box, "sleep 1")
    with pytest.raises(BoxError, match="Problem talking to the database"):
        attempts(box, before)
    for job in (before, during):
        wait_state(box, job, "COMPLETED")
    box.start_accounting()
    for job, least in ((before, 2), (during, 1)):
        assert int(wait_attempts(box, job, "COMPLETED")[0]["ElapsedRaw"]) >= least


def test_a_spent_budget_refuses_new_jobs_and_spares_running_ones(box: Box) -> None:
    account = "--account=euhpc_spent"
    for words in (
        ("add", "account", "euhpc_spent", "GrpTRESMins=billing=64"),
        ("add", "user", box.user, "account=euhpc_spent"),
    ):
        box.run("sacctmgr", "--immediate", *words)
    with pytest.raises(BoxError, match="AssocGrpBillingMinutes"):
        submit(box, "true", account, "--cpus-per-task=32", "--time=3")
    first = submit(box, "sleep 300", account, "--exclusive", "--mem=0", "--time=2")
    wait_state(box, first, "RUNNING")
    # 2 minutes x 32 are promised: what is left is not enough for the next, which waits.
    second = submit(box, "true", account, "--time=2")
    reason = "AssocGrpBillingMinutes"
    wait_for(f"{second} {reason}", lambda: show(box, second)["Reason"] == reason, seconds=20)
    assert show(box, first)["JobState"] == "RUNNING"
    box.run("scancel", first, second)


def test_two_boxes_run_side_by_side_and_end_alone(box: Box) -> None:
    owner = Owner()
    other = Box(owner.root)
    try:
        other.up()
        assert submit(other, "true") == "1"
        wait_attempts(other, "1", "COMPLETED")
        with pytest.raises(BoxError, match="this box is up"):
            Box(other.root).up()
        other.down()
        assert not list(processes(other.root))
        other.up()  # from its own folder: the books are still there
        assert attempts(other, "1")[0]["State"] == "COMPLETED"
    finally:
        owner.release()
    assert not other.root.exists()
    assert len(box.run("sinfo", "--noheader", "--Node").stdout.splitlines()) == len(NODES)


def test_a_killed_owners_box_is_cleaned_by_the_next(box: Box) -> None:
    code = """
import sys
from tests.slurm.box import Box
from tests.slurm.owner import Owner
owner = Owner()
cluster = Box(owner.root)
cluster._write_files()
cluster._start_munged()
print(cluster.root, flush=True)
sys.stdin.read()
"""
    with subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as session:
        assert session.stdout
        root = Path(session.stdout.readline().strip())
        assert root not in remove_orphans()
        assert [name for _, name in processes(root)] == ["munged"]
        session.kill()
    assert remove_orphans() == [root]
    assert not root.exists()
    assert not list(processes(root))
    assert list(processes(box.root))
