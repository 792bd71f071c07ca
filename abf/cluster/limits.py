"""Limits as the scheduler holds them: QOS, partitions, associations, and what an account has used.

Read from the scheduler at every start, because sites change them; kept in
`{results}/.driver/limits.json`. Durations are minutes, memory MB, usage TRES-minutes; None is "no
limit".
"""

from __future__ import annotations

import os
import pwd
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from abf.cluster.config import SiteConfig
from abf.cluster.slurm import call
from abf.errors import ClusterError
from abf.files import write_json

LIMITS = "limits.json"
"""File in `{results}/.driver`."""
SETTINGS = (
    *("ClusterName", "SLURM_VERSION", "MinJobAge", "JobRequeue", "PreemptType", "PreemptMode"),
    *("PriorityDecayHalfLife", "EnforcePartLimits", "AccountingStorageEnforce"),
)
"""Of the scheduler's configuration, what our jobs depend on."""
UNLIMITED = frozenset({"", "UNLIMITED", "INFINITE", "N/A", "NONE", "(null)", "N"})
MEGABYTES = {"K": 1 / 1024, "M": 1.0, "G": 1024.0, "T": 1024.0**2, "P": 1024.0**3}
_QOS = "Name,Flags,MaxWall,MaxTRESPerJob,MaxTRESPerUser,MinTRES,Preempt,PreemptMode"
_ASSOCIATION = "Account,Partition,QOS,MaxWall,MaxTRES"

Tres = Mapping[str, float]
"""Amounts by resource: node, cpu, mem, billing, gres/gpu."""


@dataclass(frozen=True)
class Qos:
    """A quality of service."""

    name: str
    flags: tuple[str, ...]
    max_minutes: float | None
    per_job: Tres
    per_user: Tres
    at_least: Tres
    """What a job must ask for."""
    preempts: tuple[str, ...]
    """QOS whose jobs have to make way for this one's."""
    preempt_mode: str
    """What happens to its own jobs then; `cluster`: what the configuration says."""


@dataclass(frozen=True)
class Partition:
    """A partition; `node` is what an average node of it has."""

    name: str
    state: str
    max_minutes: float | None
    max_nodes: float | None
    nodes: int
    node: Tres
    qos: str | None
    allowed: Mapping[str, tuple[str, ...]]
    """Only these, by `accounts`, `qos`, `groups`; absent: all."""
    denied: Mapping[str, tuple[str, ...]]


@dataclass(frozen=True)
class Association:
    """This user's right to an account."""

    account: str
    partition: str
    """Only there; empty: everywhere."""
    qos: tuple[str, ...]
    max_minutes: float | None
    per_job: Tres


@dataclass(frozen=True)
class Limits:
    """Everything the scheduler lets this user do, at one moment."""

    read_at: float
    """Unix seconds."""
    user: str
    settings: Mapping[str, str]
    qos: Mapping[str, Qos]
    partitions: Mapping[str, Partition]
    associations: tuple[Association, ...]

    def rights(self, account: str, partition: str) -> list[Association]:
        """This user's associations with the account that hold for the partition."""
        rows = [a for a in self.associations if a.account == account]
        return [a for a in rows if a.partition in ("", partition)]

    def minutes(self, account: str, partition: str, qos: str) -> list[tuple[float, str]]:
        """Longest job, shortest first, each with who says so."""
        found = [(f"partition {p.name}", p.max_minutes) for p in self._partition(partition)]
        found += [(f"QOS {q.name}", q.max_minutes) for q in self._qos(partition, qos)]
        found += [(f"account {a.account}", a.max_minutes) for a in self.rights(account, partition)]
        return sorted((value, who) for who, value in found if value is not None)

    def nodes(self, account: str, partition: str, qos: str) -> list[tuple[float, str]]:
        """Most nodes of a job, fewest first, each with who says so."""
        found = []
        for p in self._partition(partition):
            found += [(f"partition {p.name}", p.max_nodes), (f"partition {p.name}", p.nodes)]
        for q in self._qos(partition, qos):
            found += [(f"QOS {q.name}", caps.get("node")) for caps in (q.per_job, q.per_user)]
        found += [
            (f"account {a.account}", a.per_job.get("node")) for a in self.rights(account, partition)
        ]
        return sorted((float(value), who) for who, value in found if value is not None)

    def _partition(self, name: str) -> list[Partition]:
        return [self.partitions[name]] if name in self.partitions else []

    def _qos(self, partition: str, name: str) -> list[Qos]:
        """The QOS of the job, and the partition's own."""
        names = {name} | {p.qos for p in self._partition(partition) if p.qos}
        return [self.qos[n] for n in sorted(names) if n in self.qos]


@dataclass(frozen=True)
class Usage:
    """What an account may use, has used, and has given to running jobs, in TRES-minutes."""

    account: str
    caps: Tres
    used: Tres
    running: Tres

    def left(self, resource: str) -> float:
        """TRES-minutes that remain under a cap once the running jobs have ended."""
        return self.caps[resource] - self.used.get(resource, 0) - self.running.get(resource, 0)


def read_limits() -> Limits:
    """Ask controller and accounting: four calls, whatever the size of the cluster.

    Raises:
        ClusterError: one of them does not answer.
    """
    user = pwd.getpwuid(os.getuid()).pw_name
    qos = call("sacctmgr", "-nP", "show", "qos", f"format={_QOS}")
    rights = call("sacctmgr", "-nP", "show", "assoc", f"user={user}", f"format={_ASSOCIATION}")
    return Limits(
        read_at=time.time(),
        user=user,
        settings=parse_settings(call("scontrol", "show", "config")),
        qos={q.name: q for q in map(_parse_qos, qos.splitlines())},
        partitions=parse_partitions(call("scontrol", "--oneliner", "show", "partition")),
        associations=tuple(map(_parse_association, rights.splitlines())),
    )


def store_limits(site: SiteConfig, results: Path) -> Limits:
    """Read the limits and keep them, with what the site file asks for, beside the driver's state.

    Raises:
        ClusterError: the scheduler does not answer; what was stored before stays.
    """
    limits = read_limits()
    asked = site.model_dump(mode="json", exclude={"setup", "storage"})
    write_json(results / ".driver" / LIMITS, asdict(limits) | {"site": asked})
    return limits


def read_usage(account: str) -> Usage:
    """Caps and usage of an account, colleagues' and running jobs included.

    Raises:
        ClusterError: the controller does not answer, or does not know the account.
    """
    columns = "Account,User,GrpTRESMins,GrpTRESRaw,TRESRunMins"
    text = call("sshare", "-nP", f"--accounts={account}", f"--format={columns}")
    for line in text.splitlines():
        name, user, caps, used, running = line.split("|")
        if name.strip() == account and not user:
            return Usage(account, tres(caps), tres(used), tres(running))
    raise ClusterError(f"sshare knows no account {account}")


def tres(text: str) -> Tres:
    """`node=2,mem=964G,gres/gpu=8` by name, memory in MB; what has no limit is left out."""
    parts = [part.split("=", 1) for part in text.split(",") if "=" in part]
    return {name: _amount(value) for name, value in parts if value not in UNLIMITED}


def _amount(text: str) -> float:
    scale = MEGABYTES.get(text[-1:])
    return float(text) if scale is None else float(text[:-1]) * scale


def minutes(text: str) -> float | None:
    """`1-00:00:00`, `00:30:00`, `30:00`, `30`: Slurm's ways to write a time, in minutes."""
    if text.strip() in UNLIMITED:
        return None
    days, _, clock = text.strip().rpartition("-")
    numbers = [float(number) for number in clock.split(":")]
    if days:  # D-HH[:MM[:SS]]
        hours, minute, seconds = numbers + [0.0] * (3 - len(numbers))
    elif len(numbers) == 3:
        hours, minute, seconds = numbers
    else:  # MM[:SS]
        hours, minute, seconds = 0.0, *numbers, *[0.0] * (2 - len(numbers))
    return float(days or 0) * 1440 + hours * 60 + minute + seconds / 60


def parse_settings(text: str) -> dict[str, str]:
    """The lines `Name = value` of SETTINGS."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line)
    return {name.strip(): value.strip() for name, value in pairs if name.strip() in SETTINGS}


def parse_partitions(text: str) -> dict[str, Partition]:
    """Partitions in what `scontrol --oneliner show partition` printed."""
    found = {}
    for line in text.splitlines():
        words = dict(word.split("=", 1) for word in line.split() if "=" in word)
        nodes = int(words.get("TotalNodes", 0))
        whole = tres(words.get("TRES", ""))
        name = words["PartitionName"]
        found[name] = Partition(
            name=name,
            state=words["State"],
            max_minutes=minutes(words["MaxTime"]),
            max_nodes=None if words["MaxNodes"] in UNLIMITED else float(words["MaxNodes"]),
            nodes=nodes,
            node={resource: value / nodes for resource, value in whole.items() if nodes},
            qos=None if words.get("QoS", "") in UNLIMITED else words["QoS"],
            allowed=_names(words, "Allow", all_of_them="ALL"),
            denied=_names(words, "Deny", all_of_them=""),
        )
    return found


def _names(words: Mapping[str, str], verb: str, *, all_of_them: str) -> dict[str, tuple[str, ...]]:
    lists = {
        kind: words.get(f"{verb}{kind.capitalize()}") for kind in ("accounts", "qos", "groups")
    }
    return {
        kind: tuple(names.split(","))
        for kind, names in lists.items()
        if names and names != all_of_them
    }


def _list(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _parse_qos(line: str) -> Qos:
    name, flags, wall, job, user, least, preempts, mode = line.split("|")
    return Qos(
        name, _list(flags), minutes(wall), tres(job), tres(user), tres(least), _list(preempts), mode
    )


def _parse_association(line: str) -> Association:
    account, partition, qos, wall, job = line.split("|")
    return Association(account, partition, _list(qos), minutes(wall), tres(job))
