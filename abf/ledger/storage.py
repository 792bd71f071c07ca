"""Bytes that a results folder holds and will hold, against free space, quota and purge.

Method. A directory to come has the mean size of the finished ones of its stage. A trained model has
that of the finished ones per parameter, else 4 bytes a parameter (fp32). While it trains it also
holds `train.keep_checkpoints` checkpoints of 12 bytes a parameter: weights and AdamW's two moments
(`abf.train.checkpoint`); they stay until `abf gc`, and are not copied to the project area. What no
finished directory of its stage and no parameter count tells is left out of the sums, and said.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from abf.cluster.checks import Finding, Level, fail, ok, warn
from abf.cluster.config import StorageConfig
from abf.cluster.disks import Quota, Tree, free_bytes, read_quota, spoken, survey
from abf.files import real_path
from abf.ledger.work import Read, finished, manifest_of, parameters_of, reader, training_of
from abf.stages import CONFIG, MANIFEST, STAGES

WEIGHT_BYTES = 4.0
CHECKPOINT_BYTES = 12.0
"""Of a parameter: itself and two moments, fp32."""


@dataclass(frozen=True)
class Coming:
    """What the unfinished directories of a stage will hold beyond what they hold."""

    stage: str
    directories: int
    measurements: int
    """Finished directories that the size is from; 0: from parameters alone."""
    payload: float
    checkpoints: float


@dataclass(frozen=True)
class Storage:
    """Bytes at one moment."""

    results: Path
    now: Tree
    free: int
    coming: tuple[Coming, ...]
    unmeasured: Mapping[str, int]
    """Stage -> directories of which nothing is known."""
    config: StorageConfig
    kept: Path | None
    """Folder of copies, where there is one."""
    uncopied: int
    """Finished and not copied yet."""
    quota: Quota | None

    @property
    def to_come(self) -> float:
        """What the results will grow by."""
        return sum(c.payload + c.checkpoints for c in self.coming)

    @property
    def to_work(self) -> float:
        """What the project area will grow by."""
        if self.kept is not None:
            return self.uncopied + sum(c.payload for c in self.coming)
        work = self.config.work
        inside = work is not None and real_path(self.results).is_relative_to(real_path(work))
        return self.to_come if inside else 0.0


def measure_storage(
    places: Iterable[str],
    results: Path,
    config: StorageConfig,
    *,
    documents: Mapping[str, dict[str, Any]] | None = None,
) -> Storage:
    """Sizes now and to come of planned directories.

    Args:
        places: `{stage}/{key}`.
        documents: `config.json` by place, for a plan that is not written.
    """
    planned, written = documents or {}, reader(results)

    def read(place: str, name: str) -> dict[str, Any] | None:
        return planned[place] if name == CONFIG and place in planned else written(place, name)

    places = list(dict.fromkeys(places))
    kept = config.kept(results)
    sizes = {stage: _sizes(stage, results, read) for stage in STAGES}
    found: dict[str, list[tuple[float, float]]] = {}
    unmeasured: dict[str, int] = {}
    uncopied = 0
    for place in places:
        stage = place.partition("/")[0]
        if finished(place, read):
            copied = kept is not None and (kept / place / MANIFEST).exists()
            uncopied += 0 if copied else _bytes(place, read)
        elif (size := _expected(place, sizes[stage], read, results)) is None:
            unmeasured[stage] = unmeasured.get(stage, 0) + 1
        else:
            found.setdefault(stage, []).append(size)
    coming = tuple(
        Coming(stage, len(pairs), len(sizes[stage]), sum(p for p, _ in pairs),
               sum(c for _, c in pairs))
        for stage, pairs in found.items()
    )  # fmt: skip
    work = config.work
    quota = None
    if work is not None and work.is_dir():
        quota = read_quota(work, config.work_quota_gb, [])
    return Storage(
        results=results,
        now=survey(results),
        free=free_bytes(results),
        coming=coming,
        unmeasured=unmeasured,
        config=config,
        kept=kept,
        uncopied=uncopied,
        quota=quota,
    )


def _sizes(stage: str, results: Path, read: Read) -> list[tuple[int, float | None]]:
    """Bytes and parameters of the finished directories of a stage, planned still or not."""
    pattern = "*/*/config.json" if stage == "decode" else "*/config.json"
    paths = sorted((results / stage).glob(pattern))
    places = [path.parent.relative_to(results).as_posix() for path in paths]
    trained = stage in ("base", "train")
    return [
        (_bytes(place, read), parameters_of(place, read) if trained else None)
        for place in places
        if finished(place, read)
    ]


def _bytes(place: str, read: Read) -> int:
    files = (manifest_of(place, read) or {}).get("files", {})
    return sum(entry["bytes"] for entry in files.values())


def _expected(
    place: str, sizes: list[tuple[int, float | None]], read: Read, results: Path
) -> tuple[float, float] | None:
    """Bytes of payload and of checkpoints beyond what is there; none where nothing tells."""
    config = read(place, CONFIG)
    training = None if config is None else training_of(place, config)
    if training is None:
        return (sum(size for size, _ in sizes) / len(sizes), 0.0) if sizes else None
    parameters = parameters_of(place, read)
    if parameters is None:
        return None
    known = [(size, count) for size, count in sizes if count]
    each = WEIGHT_BYTES
    if known:
        each = sum(size for size, _ in known) / sum(count for _, count in known)
    rolling = CHECKPOINT_BYTES * parameters * training["keep_checkpoints"]
    there = survey(results / place / "ckpt").size
    return each * parameters, max(rolling - there, 0.0)


# --- in words ----------------------------------------------------------------------------------


def storage_lines(found: Storage) -> list[str]:
    """A few lines for `abf budget`."""
    more = "" if found.now.whole else " (of more that was not looked at)"
    lines = [
        f"storage   {spoken(found.now.size)} in {found.now.files} files below {found.results}"
        f"{more}, {spoken(found.to_come)} to come, {spoken(found.free)} free"
    ]
    for c in found.coming:
        rolling = f", and {spoken(c.checkpoints)} of checkpoints" if c.checkpoints else ""
        source = f"measured {c.measurements} time(s)" if c.measurements else "from its parameters"
        lines.append(
            f"    {c.stage:<12}{c.directories:>5} to do {spoken(c.payload):>12}{rolling}, {source}"
        )
    if found.unmeasured:
        shown = ", ".join(f"{count} {stage}" for stage, count in found.unmeasured.items())
        lines.append(f"  no size measured yet of {shown}: they are in no sum")
    findings = [f for f in _room(found) if f.level != Level.OK]
    findings += [*_project(found), *_purge(found)]
    return lines + [f"  {'WARNING: ' * (f.level != Level.OK)}{f.text}" for f in findings]


def judge(found: Storage) -> Iterator[Finding]:
    """Whether what is to come fits, and when the oldest file goes."""
    yield from _room(found)
    yield from _project(found)
    yield from _purge(found)


def _room(found: Storage) -> Iterator[Finding]:
    text = f"{spoken(found.to_come)} to come in {found.results}, {spoken(found.free)} free"
    if found.to_come > found.free:
        yield warn("storage", f"{text}: {spoken(found.to_come - found.free)} too many; `abf gc`")
    else:
        yield ok("storage", text)


def _project(found: Storage) -> Iterator[Finding]:
    work, quota = found.config.work, found.quota
    if work is None or (found.kept is None and not found.to_work):
        return
    name = f"{spoken(found.to_work)} to come in {work}"
    if found.kept is not None:
        name += f" (copies of what is finished, {spoken(found.uncopied)} of it already)"
    if quota is None:
        yield warn("storage", f"{name}, its quota is not known: set storage.work_quota_gb")
        return
    text = f"{name}, {spoken(quota.used)} of {spoken(quota.limit)} used ({quota.who})"
    over = quota.used + found.to_work - quota.limit
    if over > 0:
        yield fail(
            "storage",
            f"{text}: {spoken(over)} too many; delete there (`abf gc`), ask for more "
            "(storage.work_quota_gb), or leave out cells",
        )
    else:
        yield ok("storage", text)


def _purge(found: Storage) -> Iterator[Finding]:
    days = found.config.purge_days
    if not found.config.on_scratch(found.results) or days is None or found.now.oldest is None:
        return
    goes = time.time() + (days - found.now.oldest_days) * 86400
    day = time.strftime("%Y-%m-%d", time.localtime(goes))
    oldest = found.now.oldest.relative_to(found.results)
    text = f"purge: the file unread for longest, {oldest}, goes on {day}"
    if found.kept is None:
        yield warn("storage", f"{text}, and nothing is copied: set storage.work")
    else:
        yield ok("storage", f"{text}; finished work comes back from {found.kept}")
