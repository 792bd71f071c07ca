"""A site and its cluster's limits as the doctor reads them, and what a finding must say."""

from __future__ import annotations

import dataclasses

from abf.cluster.checks import Finding
from abf.cluster.config import SiteConfig
from abf.cluster.limits import Association, Limits, Partition, Qos


def site(**changes: object) -> SiteConfig:
    grant = {"node_hours": 90_000, "start": "2026-09-01", "end": "2027-03-31"}
    return SiteConfig.model_validate({"account": "mine", "allocation": grant} | changes)


def place(**changes: object) -> Partition:
    node = {"cpu": 32.0, "mem": 494_000.0, "gres/gpu": 4.0, "billing": 32.0, "node": 1.0}
    found = Partition("boost_usr_prod", "UP", 1440.0, None, 3456, node, None, {}, {})
    return dataclasses.replace(found, **changes)


def qos(name: str, **changes: object) -> Qos:
    return dataclasses.replace(Qos(name, (), None, {}, {}, {}, (), "cluster"), **changes)


def view(*more: Qos, where: Partition | None = None, rights: str = "mine") -> Limits:
    found = [qos("normal", per_job={"node": 64.0}), *more]
    return Limits(
        read_at=0.0,
        user="ada",
        settings={"MinJobAge": "300 sec", "PreemptMode": "REQUEUE", "JobRequeue": "1"},
        qos={q.name: q for q in found},
        partitions={"boost_usr_prod": where or place()},
        associations=(Association(rights, "", tuple(q.name for q in found), None, {}),),
    )


def told(finding: Finding, level: str, *words: str) -> None:
    assert finding.level == level, finding
    for word in words:
        assert word in finding.text, finding
