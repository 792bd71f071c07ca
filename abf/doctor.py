"""`abf doctor`: everything that can stop a study, looked at before a single job is submitted.

One line a check: OK, WARN or FAIL, and what to do. What the scheduler allows is kept with the run
(`{results}/.driver/limits.json`). With `job` it also asks a compute node what it sees.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
from collections.abc import Iterator
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from abf.artifacts import read_plans
from abf.checked import read_yaml
from abf.cluster import checks, funds, slurm
from abf.cluster.checks import Finding, Level, fail, ok, warn
from abf.cluster.config import LaunchConfig, SiteConfig
from abf.cluster.disks import disks
from abf.cluster.limits import Limits, read_usage, store_limits
from abf.cluster.probe import accepted, debug_job
from abf.cluster.saldo import read_saldo
from abf.errors import AbfError, ArtifactError, ClusterError, ConfigError, os_fault
from abf.grid import load_study
from abf.instance import Instance, origin, trainings
from abf.ledger.storage import judge, measure_storage
from abf.outside import check_outside
from abf.plan import Plan
from abf.profile import require_snakefile
from abf.site import load_site, site_path
from abf.stages import MANIFEST

CLIENTS = ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol", "sacctmgr", "sshare")
ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "envs" / "constraints.txt"
NEEDED = ("torch", "snakemake", "snakemake-executor-plugin-slurm", "submitit", "mlflow")
PATCHED = frozenset({"snakemake", "snakemake-executor-plugin-slurm"})
"""abf.driver changes their behaviour from within: with another version it might not."""
FIRST_PAUSE = 40
"""Seconds; the plugin's default of slurm-init-seconds-before-status-checks."""
NETWORK = frozenset({"pypi", "hub"})
"""Kinds of sources and checkpoints that are fetched from outside."""


def doctor(results: Path, study: Path | None, profile: str, *, job: bool) -> bool:
    """Print every finding as it is made; whether nothing failed."""
    counts = {level: 0 for level in Level}
    for finding in examine(results, study, profile, job=job):
        _say(str(finding))
        counts[finding.level] += 1
    counted = ", ".join(f"{number} {level}" for level, number in counts.items())
    end = (
        "mend what FAILed, then run it again" if counts[Level.FAIL] else "nothing stands in the way"
    )
    _say(f"doctor: {counted}; {end}")
    return not counts[Level.FAIL]


def _say(line: str) -> None:
    try:
        print(line, flush=True)
    except BrokenPipeError:  # nobody reads on (`| head`), but the exit code has to tell the rest
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def examine(results: Path, study: Path | None, profile: str, *, job: bool) -> Iterator[Finding]:
    """All findings, cheapest first; what a failed check makes meaningless is left out."""
    yield from environment()
    try:
        yield ok("snakefile", str(require_snakefile(Path.cwd())))
    except ConfigError as error:
        yield fail("snakefile", str(error))
    plan: Plan | None = None
    if study is not None:
        try:
            plan = Plan(load_study(study), results)
            check_outside(plan.study)
            yield ok("study", f"{study}: {len(plan.cells)} cell(s), valid")
        except AbfError as error:
            yield fail("study", str(error))
    if plan is not None:
        yield from offline(plan, study, profile)
    try:
        site = load_site()
    except ConfigError as error:
        yield fail("site", str(error))
        return
    yield ok("site", f"{site_path()}: account {site.account}, {site.partition}, {site.qos}")
    try:
        yield from disks(results, site.storage)
        yield from sizes(results, site, plan)
    except ConfigError as error:
        yield fail("storage", str(error))
    yield funds.allocation(site, date.today())
    yield from cluster(site, results, plan, profile, job=job)


def sizes(results: Path, site: SiteConfig, plan: Plan | None) -> Iterator[Finding]:
    """Whether what is to come fits on the disks, for the study or for all that is planned."""
    if plan is None:
        documents = {}
        places = [place for found in read_plans(results) for place in found["stages"]]
    else:  # it need not be written yet
        documents = {i.place: plan.document(i) for i in plan.instances.values()}
        places = plan.as_document()["stages"]
    if places:
        yield from judge(measure_storage(places, results, site.storage, documents=documents))


# --- the scheduler -----------------------------------------------------------------------------


def cluster(
    site: SiteConfig, results: Path, plan: Plan | None, profile: str, *, job: bool
) -> Iterator[Finding]:
    """Whether the scheduler is there and lets the site file's jobs in."""
    if missing := [name for name in CLIENTS if shutil.which(name) is None]:
        yield fail(
            "slurm",
            f"no {', '.join(missing)} here: run this where Slurm's commands are (login node)",
        )
        return
    try:
        slurm.call("scontrol", "ping", timeout=30)
        limits = store_limits(site, results)
    except ClusterError as error:
        yield fail("slurm", f"{error}: nothing below it was looked at; try again when it is back")
        return
    except (ArtifactError, OSError) as error:
        yield fail("limits", f"cannot be stored below {results}: {os_fault(error) or error}")
        return
    told = limits.settings
    yield ok(
        "slurm",
        f"controller and accounting of {told.get('ClusterName')} answer, Slurm "
        f"{told.get('SLURM_VERSION')}; limits stored in {results}/.driver/limits.json",
    )
    plans = trainings(plan.instances.values() if plan else ())
    entry = checks.entry(site, limits, plans, checks.lanes(site))
    yield from entry
    if all(finding.level != Level.FAIL for finding in entry):
        yield from accepted(site, list(plans) or [LaunchConfig(minutes=site.max_minutes)])
    yield from budget(site, limits, list(plans))
    yield from status(limits, profile)
    yield checks.requeue(site, limits)
    if job and all(finding.level != Level.FAIL for finding in entry):
        yield from debug_job(site, limits, results)
    elif job:
        yield warn("job", "not submitted: it would be refused (see FAIL above)")


def budget(site: SiteConfig, limits: Limits, plans: list[LaunchConfig]) -> Iterator[Finding]:
    """What is left: by the scheduler's cap, and by the site's own books."""
    decay = limits.settings.get("PriorityDecayHalfLife", "")
    try:
        if any(a.account == site.account for a in limits.associations):
            yield from funds.scheduler_budget(site, read_usage(site.account), decay, plans)
    except ClusterError as error:
        yield warn("budget", f"the scheduler does not tell what is left: {error}")
    try:
        books = read_saldo()
        if books is not None:
            yield from funds.saldo(site, books, date.today())
    except ClusterError as error:
        yield warn("saldo", str(error))


# --- this machine ------------------------------------------------------------------------------


def environment() -> Iterator[Finding]:
    """Whether the installed packages are the pinned ones."""
    if not CONSTRAINTS.exists():
        yield warn("environment", f"{CONSTRAINTS} does not exist, so versions are not compared")
        return
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pinned = dict(line.split("==", 1) for line in lines if "==" in line and line[0] != "#")
    found: dict[str, str] = {}
    for name in pinned.keys() | set(NEEDED):
        try:
            found[name] = version(name).partition("+")[0]
        except PackageNotFoundError:
            continue
    missing = [name for name in NEEDED if name not in found]
    other = {name: (v, pinned[name]) for name, v in found.items() if v != pinned.get(name, v)}
    shown = ", ".join(f"{name} {v} (pinned {p})" for name, (v, p) in sorted(other.items()))
    repair = f"pip install -c {CONSTRAINTS} -r {CONSTRAINTS.with_name('cpu.txt')}"
    here = f"{sys.executable} (python {platform.python_version()}, abf {version('abf')})"
    if missing:
        yield fail("environment", f"{here} has no {', '.join(missing)}: {repair}")
    elif PATCHED & other.keys():
        yield fail("environment", f"{here} has {shown}: {repair}")
    elif other:
        yield warn("environment", f"{here} has {shown}; results may differ in the last bits")
    else:
        needed = ", ".join(f"{name} {found[name]}" for name in NEEDED)
        yield ok("environment", f"{here}: {needed}, all {len(found)} as pinned")


def status(limits: Limits, profile: str) -> Iterator[Finding]:
    """Whether Snakemake finds the profile, and will notice a cancelled job with it."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    ours = ROOT / "profiles" / profile
    # In Snakemake's order; it never looks into ./profiles.
    places = (Path(profile), home / "snakemake" / profile, ours)
    folder = next((place for place in places if (place / "config.yaml").exists()), None)
    if folder is None:
        yield fail("profile", f"{profile!r} is neither a folder nor one of {home}/snakemake")
        return
    if folder == ours:
        yield warn("profile", f"Snakemake does not find {profile!r} by its name: run `make setup`")
    settings = read_yaml(folder / "config.yaml")
    pause = int(settings.get("slurm-init-seconds-before-status-checks", FIRST_PAUSE))
    yield checks.status_command(limits, pause, settings.get("slurm-status-command", "sacct"))


def offline(plan: Plan, study: Path | None, profile: str) -> Iterator[Finding]:
    """Whether what comes from a network is here already, or can be fetched."""
    wanting = [i for i in plan.instances.values() if needs_network(i)]
    absent = [i for i in wanting if not (i.directory(plan.results) / MANIFEST).exists()]
    if not absent:
        text = f"{len(wanting)} stage(s) from a network, all fetched"
        yield ok("data", text if wanting else "nothing comes from a network")
        return
    names = ", ".join(i.place for i in absent)
    command = " ".join(
        [
            *("snakemake", "--profile", profile, "--config", f"study={study}"),
            *(
                f"results={plan.results}",
                "--",
                *(f"{plan.results}/{i.place}/{MANIFEST}" for i in absent),
            ),
        ]
    )
    if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "TRUE", "YES", "ON") and any(
        kind(i) == "hub" for i in absent
    ):
        yield fail(
            "data",
            f"{names}: not fetched, and HF_HUB_OFFLINE={os.environ['HF_HUB_OFFLINE']} forbids it: "
            f"unset it and run `{command}` where there is a network",
        )
    else:
        yield warn(
            "data",
            f"{names}: not fetched yet; compute nodes have no network. The driver fetches on the "
            f"serial partition; to see it now, on a login node: {command}",
        )


def kind(instance: Instance) -> str:
    """Kind of the source or checkpoint that a stage fetches; empty when it fetches none."""
    return origin(instance.stage, instance.config).get("kind", "")


def needs_network(instance: Instance) -> bool:
    """Whether a stage reads from outside of this machine."""
    return kind(instance) in NETWORK
