"""What stands between a site file and its jobs, told from limits that were read before.

Pure functions: the scheduler's limits in, findings out, one line each. Durations are minutes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from abf.cluster.config import LaunchConfig, SiteConfig
from abf.cluster.limits import Limits, Partition, Qos
from abf.errors import ConfigError

SIGNAL_EARLY_SECONDS = 60
"""Slurm may send the warning before the time limit this much too early."""
SQUEUE_FACTOR = 3
"""The Snakemake plugin trusts squeue only if MinJobAge is this many times its first pause."""


class Level(StrEnum):
    """How bad it is: only FAIL stops."""

    OK = "OK"
    WARN = "WARN"
    FAIL = "FAIL"


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's."""

    level: Level
    what: str
    text: str

    def __str__(self) -> str:
        line = "; ".join(part.strip() for part in self.text.splitlines() if part.strip())
        return f"{self.level:<4}  {self.what:<12} {line}"


def ok(what: str, text: str) -> Finding:
    """All is well."""
    return Finding(Level.OK, what, text)


def warn(what: str, text: str) -> Finding:
    """Jobs run, but somebody should know."""
    return Finding(Level.WARN, what, text)


def fail(what: str, text: str) -> Finding:
    """Jobs would be refused, wait for ever, or lose something."""
    return Finding(Level.FAIL, what, text)


def account(site: SiteConfig, limits: Limits) -> Finding:
    """Whether this user may charge the account."""
    mine = sorted({a.account for a in limits.associations})
    if site.account not in mine:
        allowed = f"may use {', '.join(mine)}" if mine else "may use no account on this cluster"
        return fail(
            "account",
            f"{site.account!r} is not one of {limits.user}'s: {limits.user} {allowed}. Correct "
            "`account` (or ABF_ACCOUNT), or ask the project's PI to add you",
        )
    if not limits.rights(site.account, site.partition):
        places = sorted({a.partition for a in limits.associations if a.account == site.account})
        return fail(
            "account",
            f"{limits.user} may use {site.account} only on partition {', '.join(places)}, not on "
            f"{site.partition!r}: correct `partition`",
        )
    return ok("account", f"{limits.user} may use {site.account}")


@dataclass(frozen=True)
class Lane:
    """Where one kind of job goes, and the site-file keys that say so."""

    partition: str
    qos: str
    minutes: int
    keys: tuple[str, str, str]


def lanes(site: SiteConfig) -> tuple[Lane, Lane]:
    """What computes, and the driver."""
    return (
        Lane(site.partition, site.qos, site.max_minutes, ("partition", "qos", "max_minutes")),
        Lane(
            *(site.serial_partition, site.serial_qos, site.serial_minutes),
            ("serial_partition", "serial_qos", "serial_minutes"),
        ),
    )


def partition(lane: Lane, site: SiteConfig, limits: Limits) -> Finding:
    """Whether the partition exists, is up, and takes the account."""
    key, found = lane.keys[0], limits.partitions.get(lane.partition)
    if found is None:
        there = ", ".join(sorted(limits.partitions))
        return fail("partition", f"{key}={lane.partition!r} does not exist; there are {there}")
    if refused := _refused(found, "accounts", site.account):
        return fail("partition", f"{key}={found.name!r} {refused}: correct `{key}` or `account`")
    if found.state == "INACTIVE":
        return fail("partition", f"{key}={found.name!r} is INACTIVE and refuses jobs: wait")
    if found.state != "UP":
        return warn("partition", f"{key}={found.name!r} is {found.state}: jobs wait until it is up")
    return ok("partition", f"{found.name} is up, {found.nodes} nodes, takes {site.account}")


def _refused(found: Partition, kind: str, name: str) -> str | None:
    allowed, denied = found.allowed.get(kind), found.denied.get(kind, ())
    if allowed is not None and name not in allowed:
        return f"takes only {kind} {', '.join(allowed)}, not {name!r}"
    return f"refuses {kind} {', '.join(denied)}" if name in denied else None


def qos(lane: Lane, site: SiteConfig, limits: Limits) -> Finding:
    """Whether account and partition may use the QOS, and jobs are no longer than it allows."""
    partition_key, key, minutes_key = lane.keys
    rights = limits.rights(site.account, lane.partition)
    mine = sorted({name for a in rights for name in a.qos})
    if lane.qos not in limits.qos:
        why = f"{key}={lane.qos!r} does not exist"
    elif rights and lane.qos not in mine:  # without rights, the account or partition is wrong
        why = f"{key}={lane.qos!r} is not open to account {site.account}"
    else:
        why = ""
    if why:
        allowed = f"it may use {', '.join(mine)}" if mine else f"there are {', '.join(limits.qos)}"
        return fail("qos", f"{why}; {allowed}: correct `{key}`")
    place = limits.partitions.get(lane.partition)
    if place is not None and (refused := _refused(place, "qos", lane.qos)):
        return fail("qos", f"{partition_key}={place.name!r} {refused}: correct `{key}`")
    walls = limits.minutes(site.account, lane.partition, lane.qos)
    if walls and lane.minutes > walls[0][0]:
        longest, who = walls[0]
        return fail(
            "qos",
            f"{minutes_key}={lane.minutes} is longer than the {longest:.0f} minutes of {who}: set "
            f"`{minutes_key}: {longest:.0f}` (longer work queues again by itself)",
        )
    nodes = limits.nodes(site.account, lane.partition, lane.qos)
    caps = [f"{value:.0f} minutes ({who})" for value, who in walls[:1]]
    caps += [f"{value:.0f} nodes ({who})" for value, who in nodes[:1]]
    return ok("qos", f"{lane.qos} on {lane.partition}: a job has at most {', '.join(caps)}")


def node(site: SiteConfig, limits: Limits) -> Finding:
    """Whether a full node is what the site file says: node-hours are counted in it."""
    there, told = limits.partitions[site.partition].node, site.node
    said = {
        "cpu": ("cores", told.cores),
        "mem": ("memory_mb", told.memory_mb),
        "gres/gpu": ("gpus", told.gpus),
        "billing": ("billing", told.billing),
    }
    wrong = {
        f"node.{key}={value:g}, but {site.partition} has {there.get(resource, 0):g} a node": (
            resource != "billing" and there.get(resource, 0) < value
        )
        for resource, (key, value) in said.items()
        if abs(there.get(resource, 0) - value) > 0.01 * value
    }
    if wrong:
        # More than there is would be refused; less, or another price, only counts wrongly.
        judge = fail if any(wrong.values()) else warn
        return judge("node", f"{'; '.join(wrong)}: correct `node` in the site file")
    return ok("node", f"{told.cores} cores, {told.gpus} GPUs, billed {told.billing:g} as said")


def launches(
    site: SiteConfig, limits: Limits, plans: Mapping[LaunchConfig, list[str]]
) -> Iterator[Finding]:
    """Whether every training of a study fits; `plans`: launch settings, and who has them."""
    nodes = limits.nodes(site.account, site.partition, site.qos)
    least = _least(limits.qos.get(site.qos))
    for plan, places in plans.items():
        who = f"{len(places)} training(s) ({places[0]}{', ...' if places[1:] else ''})"
        seconds = min(plan.minutes, site.max_minutes) * 60
        short = site.signal_seconds + SIGNAL_EARLY_SECONDS
        wanted = {"gres/gpu": plan.nodes * site.node.gpus, "node": plan.nodes}
        missed = [f"{n:g} {name}" for name, n in least.items() if wanted.get(name, n) < n]
        if nodes and plan.nodes > nodes[0][0]:
            yield fail(
                "launch",
                f"launch.nodes={plan.nodes} of {who}: {nodes[0][1]} takes at most "
                f"{nodes[0][0]:.0f} nodes a job; lower launch.nodes or take another QOS",
            )
        elif missed:
            yield fail(
                "launch",
                f"launch.nodes={plan.nodes} of {who}: QOS {site.qos} is for at least "
                f"{' and '.join(missed)} a job; take another QOS",
            )
        elif plan.ranks_per_node > site.node.cores:
            yield fail(
                "launch",
                f"launch.ranks_per_node={plan.ranks_per_node} of {who} is more than the "
                f"{site.node.cores} cores of a node",
            )
        elif seconds <= short:
            yield fail(
                "launch",
                f"{who}: a job of {seconds // 60} minutes is warned {short} s before its end, at "
                "once: raise launch.minutes or lower signal_seconds",
            )
        elif site.node.gpus and plan.ranks_per_node != site.node.gpus:
            yield warn(
                "launch",
                f"launch.ranks_per_node={plan.ranks_per_node} of {who}, but a node has "
                f"{site.node.gpus} GPUs; one rank a GPU is meant",
            )
        else:
            yield ok("launch", f"{who}: {plan.nodes} node(s), {seconds // 60} minutes a job")


def entry(
    site: SiteConfig,
    limits: Limits,
    plans: Mapping[LaunchConfig, list[str]],
    lanes: Sequence[Lane],
) -> list[Finding]:
    """Whether the scheduler lets jobs in on these lanes."""
    places = [account(site, limits), *(partition(lane, site, limits) for lane in lanes)]
    services = [qos(lane, site, limits) for lane in lanes]
    if any(finding.level == Level.FAIL for finding in places):
        # A QOS that is wrong as well is said; that it is right means nothing yet.
        return places + [finding for finding in services if finding.level == Level.FAIL]
    return [*places, *services, node(site, limits), *launches(site, limits, plans)]


def refuse(findings: Iterable[Finding]) -> None:
    """Let nothing be submitted that would be refused, or wait for ever.

    Raises:
        ConfigError: something FAILs; each with what to do.
    """
    if wrong := [f"{f.what}: {f.text}" for f in findings if f.level == Level.FAIL]:
        raise ConfigError(
            "\n".join(["nothing was submitted (`abf doctor` checks the same and more):", *wrong])
        )


def _least(found: Qos | None) -> Mapping[str, float]:
    return {} if found is None else found.at_least


def status_command(limits: Limits, first_pause: int, command: str) -> Finding:
    """Whether a cancelled job will be noticed."""
    age = int(limits.settings.get("MinJobAge", "0").split()[0])
    why = "sacct prints `CANCELLED by UID`, on which the plugin waits for ever"
    if command != "squeue":
        return fail(
            "status", f"the profile's slurm-status-command is {command!r}: set it to squeue ({why})"
        )
    if age < SQUEUE_FACTOR * first_pause:
        return fail(
            "status",
            f"MinJobAge={age} s is less than {SQUEUE_FACTOR} x slurm-init-seconds-before-status-"
            f"checks={first_pause}, so the plugin falls back to sacct ({why}): set it to at most "
            f"{age // SQUEUE_FACTOR} in the profile",
        )
    return ok(
        "status",
        f"squeue sees cancelled jobs: MinJobAge={age} s >= {SQUEUE_FACTOR} x {first_pause}",
    )


def requeue(site: SiteConfig, limits: Limits) -> Finding:
    """What happens to a job that is preempted or loses its node."""
    rivals = sorted(q.name for q in limits.qos.values() if site.qos in q.preempts)
    found = limits.qos.get(site.qos)
    mode = limits.settings.get("PreemptMode", "OFF")
    if found is not None and found.preempt_mode not in ("cluster", ""):
        mode = found.preempt_mode.upper()
    by = f"by {', '.join(rivals)}" if rivals else "by nobody"
    text = f"{site.qos} can be preempted {by} (PreemptMode={mode})"
    if rivals and "REQUEUE" not in mode:
        return warn(
            "requeue",
            f"{text}: jobs are not queued again by Slurm; trainings are submitted again from their "
            "checkpoint, other jobs once by the profile's restart-times",
        )
    if limits.settings.get("JobRequeue") == "0":
        return warn(
            "requeue",
            f"{text}; JobRequeue=0: trainings and the driver ask to be queued again, other jobs "
            "that lose their node are tried once more by the profile's restart-times",
        )
    return ok("requeue", f"{text}; a job that loses its node is queued again (JobRequeue=1)")
