"""What the doctor concludes on accounts, limits, budgets and jobs that no machine here has."""

from __future__ import annotations

import dataclasses
from datetime import date
from pathlib import Path

import pytest

from abf.cluster import checks, funds, limits, probe, saldo
from abf.cluster.checks import Finding, Level
from abf.cluster.config import LaunchConfig, SiteConfig
from abf.cluster.limits import Association, Usage
from abf.errors import ClusterError
from tests.doctor_cases import place, qos, site, told, view

TODAY = date(2026, 11, 22)


def lane(settings: SiteConfig) -> checks.Lane:
    return checks.lanes(settings)[0]


# --- what Slurm prints -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1-00:00:00", 1440),
        ("4-00", 5760),
        ("1-12:30", 2190),
        ("00:30:00", 30),
        ("30:00", 30),
        ("45", 45),
        ("00:00:30", 0.5),
        ("UNLIMITED", None),
        ("", None),
        ("INFINITE", None),
    ],
)
def test_times_as_slurm_writes_them(text: str, expected: float | None) -> None:
    assert limits.minutes(text) == expected


def test_amounts() -> None:
    text = "cpu=128,mem=1976000M,node=4,gres/gpu=16,energy=N"
    assert limits.tres(text) == {"cpu": 128, "mem": 1_976_000, "node": 4, "gres/gpu": 16}
    assert limits.tres("mem=482G") == {"mem": 482 * 1024}
    assert limits.tres("") == {}


def test_a_partition_that_takes_only_some() -> None:
    line = (
        "PartitionName=p AllowGroups=ALL AllowAccounts=a,b AllowQos=ALL DenyQos=slow QoS=p_qos "
        "MaxNodes=8 MaxTime=UNLIMITED State=UP TotalNodes=2 TRES=cpu=64,mem=100G,node=2"
    )
    found = limits.parse_partitions(line)["p"]
    assert (found.max_nodes, found.max_minutes, found.qos) == (8, None, "p_qos")
    assert (found.allowed, found.denied) == ({"accounts": ("a", "b")}, {"qos": ("slow",)})
    assert found.node == {"cpu": 32, "mem": 51_200, "node": 1}


def test_saldo_as_documented() -> None:
    text = """
account     start     end         total        localCluster   totConsumed     totConsumed     monthTotal     monthConsumed
                                  (local h)   Consumed(local h)     (local h)               %      (local h)         (local h)
Proj_A   20110323   20300323   50000   25000   55027726   50.0   600   601
Proj_C   20230524   20300323   6500   0   0   0.0   0   0
"""  # noqa: E501
    found = saldo.parse_saldo(text)
    assert found.keys() == {"Proj_A", "Proj_C"}
    expected = saldo.Saldo("Proj_A", date(2011, 3, 23), date(2030, 3, 23), 50000, 25000, 600, 601)
    assert found["Proj_A"] == expected
    assert saldo.parse_saldo("no project found\n") == {}
    with pytest.raises(ClusterError, match="other columns than documented"):
        saldo.parse_saldo("Proj_A 20110323 20300323 50000\n")


# --- account, partition, QOS -------------------------------------------------------------------


def test_an_account_of_others() -> None:
    told(checks.account(site(), view()), "OK", "ada may use mine")
    told(checks.account(site(), view(rights="theirs")), "FAIL", "ada may use theirs")
    nobody = dataclasses.replace(view(), associations=())
    told(checks.account(site(), nobody), "FAIL", "may use no account on this cluster")
    row = Association("mine", "dcgp", ("normal",), None, {})
    elsewhere = dataclasses.replace(view(), associations=(row,))
    told(checks.account(site(), elsewhere), "FAIL", "only on partition dcgp")


def test_a_partition_with_doors() -> None:
    settings = site()

    def judged(**changes: object) -> Finding:
        return checks.partition(lane(settings), settings, view(where=place(**changes)))

    told(judged(), "OK", "is up, 3456 nodes")
    told(judged(state="DOWN"), "WARN", "jobs wait until it is up")
    told(judged(state="INACTIVE"), "FAIL", "refuses jobs")
    told(judged(allowed={"accounts": ("theirs",)}), "FAIL", "takes only accounts theirs")
    told(judged(denied={"accounts": ("mine",)}), "FAIL", "refuses accounts mine")
    closed = view(where=place(allowed={"qos": ("debug",)}))
    told(checks.qos(lane(settings), settings, closed), "FAIL", "takes only qos debug, not 'normal'")


def test_the_shortest_limit_counts_whoever_sets_it() -> None:
    settings = site()
    own = qos("own", max_minutes=600.0, per_job={"node": 16.0})
    found = view(own, where=place(qos="own"))
    told(checks.qos(lane(settings), settings, found), "FAIL", "600 minutes of QOS own")
    short = site(max_minutes=600)
    told(checks.qos(lane(short), short, found), "OK", "600 minutes (QOS own), 16 nodes (QOS own)")


def test_what_is_wrong_is_said_once() -> None:
    """A QOS beside a partition or an account that is wrong as well."""
    settings, limits = site(partition="nosuch", qos="gone"), view()
    told(checks.partition(lane(settings), settings, limits), "FAIL", "'nosuch' does not exist")
    told(checks.qos(lane(settings), settings, limits), "FAIL", "qos='gone' does not exist")
    others = view(rights="theirs")
    told(checks.qos(lane(site()), site(), others), "OK")
    told(checks.qos(lane(settings), settings, others), "FAIL", "does not exist; there are normal")


def test_trainings_that_no_job_can_hold() -> None:
    def judged(plan: LaunchConfig, **changes: object) -> Finding:
        settings = site(**changes)
        (finding,) = checks.launches(settings, view(), dict([(plan, ["train/a", "train/b"])]))
        return finding

    told(judged(LaunchConfig(nodes=64)), "OK", "2 training(s) (train/a, ...): 64 node(s), 1440")
    told(judged(LaunchConfig(nodes=65)), "FAIL", "launch.nodes=65", "at most 64 nodes a job")
    told(judged(LaunchConfig(ranks_per_node=33)), "FAIL", "more than the 32 cores")
    told(judged(LaunchConfig(ranks_per_node=8)), "WARN", "one rank a GPU is meant")
    told(judged(LaunchConfig(minutes=6)), "FAIL", "6 minutes is warned 360 s before its end")
    told(judged(LaunchConfig(minutes=6), signal_seconds=30), "OK")


def test_a_node_of_another_shape() -> None:
    told(checks.node(site(), view()), "OK", "32 cores, 4 GPUs, billed 32 as said")
    told(checks.node(site(node={"cores": 48}), view()), "FAIL", "node.cores=48, but boost_usr_prod")
    told(checks.node(site(node={"memory_mb": 400_000}), view()), "WARN", "has 494000 a node")
    told(
        checks.node(site(node={"billing": 64}), view()), "WARN", "node.billing=64", "has 32 a node"
    )


# --- budget ------------------------------------------------------------------------------------


def budget(used: float, plan: LaunchConfig | None = None, **changes: object) -> list[Finding]:
    """With a cap of 100 node-hours on billing."""
    usage = Usage("mine", {"billing": 100 * 60 * 32.0}, {"billing": used * 60 * 32}, {})
    settings = site(allocation={"node_hours": 100, "start": TODAY, "end": TODAY}, **changes)
    return list(funds.scheduler_budget(settings, usage, "00:00:00", [plan] if plan else []))


def test_what_is_left_is_told_in_node_hours() -> None:
    (found,) = budget(25)
    told(found, "OK", "75.0 of 100.0 node-hours left to mine (cap on billing)")
    told(budget(100)[0], "FAIL", "no job will start")
    told(budget(60, LaunchConfig(nodes=2))[0], "FAIL", "reserves 48.0 and would wait for ever")
    told(budget(60, LaunchConfig(nodes=2), max_minutes=60)[0], "OK")


def test_the_tightest_of_several_caps_and_running_jobs_count() -> None:
    caps = {"billing": 100 * 60 * 32.0, "gres/gpu": 50 * 60 * 4.0, "vmem": 1.0}
    usage = Usage("mine", caps, {"gres/gpu": 10 * 60 * 4.0}, {"gres/gpu": 15 * 60 * 4.0})
    first, second = funds.scheduler_budget(site(), usage, "7-00:00:00", [])
    told(first, "WARN", "25.0 of 50.0 node-hours", "cap on gres/gpu", "halves every 7-00:00:00")
    told(second, "WARN", "allocation.node_hours=90,000, but the scheduler stops at 50")
    (found,) = funds.scheduler_budget(site(), Usage("mine", {}, {}, {}), "", [])
    told(found, "WARN", "holds no cap for mine")


def test_the_calendar() -> None:
    told(funds.allocation(site(), TODAY), "OK", "in 129 days")
    told(funds.allocation(site(), date(2027, 3, 31)), "WARN", "in 0 day(s)")
    told(funds.allocation(site(), date(2027, 4, 1)), "FAIL", "ended on 2027-03-31")
    told(funds.allocation(site(), date(2026, 8, 31)), "FAIL", "begins on 2026-09-01")
    told(funds.allocation(site(allocation=None), TODAY), "WARN", "add `allocation:")


def test_books_that_differ_from_the_site_file() -> None:
    row = saldo.Saldo("mine", date(2026, 9, 1), date(2027, 3, 31), 2_880_000, 0, 400_000, 0)
    assert [f.level for f in funds.saldo(site(), {"mine": row}, TODAY)] == ["OK", "OK"]
    other = dataclasses.replace(row, end=date(2027, 2, 28))
    (*_, last) = funds.saldo(site(), {"mine": other}, TODAY)
    told(last, "WARN", "saldo 90,000 from 2026-09-01 to 2027-02-28: correct `allocation`")
    (first, *_) = funds.saldo(site(), {"mine": dataclasses.replace(row, consumed=3e6)}, TODAY)
    told(first, "FAIL", "jobs will be refused")


# --- how Slurm ends and shows jobs -------------------------------------------------------------


def test_the_status_command() -> None:
    told(checks.status_command(view(), 100, "squeue"), "OK")
    told(checks.status_command(view(), 101, "squeue"), "FAIL", "falls back to sacct")
    told(checks.status_command(view(), 40, "sacct"), "FAIL", "'sacct': set it to squeue")


def test_preemption() -> None:
    assert "preempted by nobody" in checks.requeue(site(), view()).text
    rival = qos("urgent", preempts=("normal",))
    told(checks.requeue(site(), view(rival)), "OK", "preempted by urgent (PreemptMode=REQUEUE)")
    ours = qos("normal", preempt_mode="cancel")
    told(checks.requeue(site(), view(rival, ours)), "WARN", "submitted again from their checkpoint")
    settings = {"PreemptMode": "OFF", "JobRequeue": "0"}
    found = dataclasses.replace(view(), settings=settings)
    told(checks.requeue(site(), found), "WARN", "JobRequeue=0")


# --- the debug job -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "level", "words"),
    [
        ("visible=0,1,2,3\nabf listed=4\nabf torch=2.13.0+cu126 4", Level.OK, "lists 4"),
        ("visible=0,1,2,3\nabf listed=4\nabf torch=2.13.0+cpu 0", Level.FAIL, "the CUDA build"),
        ("visible=0,1,2,3\nabf listed=3\nabf torch=2.13.0+cu126 3", Level.FAIL, "nvidia-smi lists"),
        ("visible=0,1\nabf listed=4\nabf torch=2.13.0+cu126 2", Level.FAIL, "node.gpus=4: correct"),
        ("visible=0,1,2,3\nabf torch=2.13.0+cpu 0", Level.WARN, "no nvidia-smi there"),
        ("visible=0,1,2,3\nModuleNotFoundError: torch", Level.FAIL, "ModuleNotFoundError: torch"),
    ],
)
def test_what_a_node_said(tmp_path: Path, said: str, level: Level, words: str) -> None:
    log = tmp_path / "doctor-7.log"
    log.write_text(f"abf host=lrdn0001\nabf {said}\n")
    told(probe.judge(site(), "7", "boost_qos_dbg", "COMPLETED", log), level, "job 7", words)


def test_a_long_queue_is_no_fault(tmp_path: Path) -> None:
    told(
        probe.judge(site(), "7", "normal", "PENDING", tmp_path / "no"), "WARN", "was PENDING after"
    )
