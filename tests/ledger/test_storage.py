"""Bytes to come against free space, quota and purge, from plans, manifests and parameters."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from abf.budget import show_budget
from abf.cluster.checks import Level
from abf.cluster.config import StorageConfig
from abf.doctor import sizes
from abf.ledger import storage
from abf.ledger.forecast import training_parameters
from abf.ledger.storage import Storage, judge, measure_storage, storage_lines
from abf.model.config import ShapeConfig
from abf.plan import Plan
from abf.stages import STAGES
from tests.ledger.accounting import RUN, SITE

PARAMETERS = training_parameters(
    ShapeConfig().model_dump(), vocabulary=400, longest_block=63
)  # fmt: skip


def measured(plan: Plan, config: StorageConfig | None = None) -> Storage:
    stages = plan.as_document()["stages"]
    return measure_storage(stages, plan.results, config or StorageConfig())


def finish(directory: Path, size: int) -> None:
    """A finished directory of a payload of `size` bytes."""
    (directory / ".done").mkdir(parents=True, exist_ok=True)
    entry = {"bytes": size, "sha256": "", "mtime_ns": 0}
    version = STAGES[directory.parent.name].version
    document = {
        "stage": directory.parent.name, "stage_version": version, "config": None, "inputs": {},
        "counts": {}, "files": {"payload": entry}, "started": 0.0, "seconds": 1.0,
    }  # fmt: skip
    (directory / ".done/manifest.json").write_text(json.dumps(document))


def test_without_a_measurement_only_trainings_have_a_size_and_it_is_said(
    plan: Callable[..., Plan],
) -> None:
    found = measured(plan(RUN.replace("\ntrain: {", "\ntrain: {keep_checkpoints: 3, ")))
    sizes = {c.stage: c for c in found.coming}
    assert sizes.keys() == {"base", "train"}
    assert sizes["train"].payload == 4 * PARAMETERS
    assert sizes["train"].checkpoints == 3 * 12 * PARAMETERS
    assert sizes["base"].checkpoints == 2 * 12 * PARAMETERS
    assert found.unmeasured["score"] == found.unmeasured["prepare"] == 1
    lines = storage_lines(found)
    assert "train           1 to do" in lines[2]
    assert "from its parameters" in lines[2]
    assert lines[3].startswith("  no size measured yet of 1 fetch, 1 prepare, ")
    assert lines[3].endswith("they are in no sum")


def test_sizes_are_those_of_finished_directories_less_what_is_there(
    plan: Callable[..., Plan], tmp_path: Path
) -> None:
    first, results = (
        plan(RUN.replace("tokens: 2560", "tokens: 1280")).cells[0],
        tmp_path / "results",
    )
    finish(first.train.directory(results), 10 * PARAMETERS)
    finish(first.score.directory(results), 1000)
    finish(first.pack.directory(results), 50)
    second = plan()
    checkpoint = results / second.cells[0].train.place / "ckpt" / "step-00000001" / "model"
    checkpoint.parent.mkdir(parents=True)
    checkpoint.write_bytes(b"x" * 12 * PARAMETERS)
    coming = {c.stage: c for c in measured(second).coming}
    assert coming["score"].payload == 1000
    assert coming["train"].payload == pytest.approx(10 * PARAMETERS)
    assert coming["train"].checkpoints == 12 * PARAMETERS  # one of two is there
    # The arm's is done; the one that all bases are trained on is not.
    assert (coming["pack"].directories, coming["pack"].payload) == (1, 50)


def test_what_does_not_fit_is_warned_of_or_fails(
    plan: Callable[..., Plan], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("work", "far/work"):
        (tmp_path / name).mkdir(parents=True)
    planned = plan()
    finish(planned.cells[0].score.directory(planned.results), 3_000_000)
    need = 3_000_000 + 2 * 4 * PARAMETERS

    def judged(**storage: object) -> list[tuple[str, str]]:
        found = measured(planned, StorageConfig.model_validate(storage))
        return [(f.level, f.text) for f in judge(found)]

    (room,) = judged()
    assert room[0] == Level.OK
    room, project = judged(work=tmp_path / "work", work_quota_gb=need / 1e9 + 1e-6)
    assert project[0] == Level.OK
    assert "(copies of what is finished, 3.0 MB of it already)" in project[1]
    room, project = judged(work=tmp_path / "work", work_quota_gb=need / 1e9 - 1e-3)
    assert project[0] == Level.FAIL
    assert "1.0 MB too many; delete there (`abf gc`), ask for more" in project[1]
    _, project = judged(work=tmp_path / "work")
    assert project[0] == Level.WARN
    assert "set storage.work_quota_gb" in project[1]
    # Results on the project area itself: checkpoints count there, too.
    room, project = judged(work=tmp_path, work_quota_gb=1)
    assert f"{2 * 28 * PARAMETERS / 1e6:.1f} MB to come in {tmp_path}, " in project[1]
    monkeypatch.setattr(storage, "free_bytes", lambda path: 1_000_000)
    ((level, text),) = judged()
    assert level == Level.WARN
    assert "1.0 MB free: " in text
    assert text.endswith("too many; `abf gc`")


def test_the_day_on_which_the_oldest_file_goes(plan: Callable[..., Plan], tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    planned = plan()
    oldest = planned.results / "fetch" / "old"
    oldest.write_text("unread")
    then = time.time() - 30 * 86400
    os.utime(oldest, (then, then))
    config = {"scratch": planned.results, "purge_days": 40}
    *_, alone = judge(measured(planned, StorageConfig.model_validate(config)))
    day = time.strftime("%Y-%m-%d", time.localtime(then + 40 * 86400))
    assert f"fetch/old, goes on {day}, and nothing is copied: set storage.work" in alone.text
    assert alone.level == Level.WARN
    config |= {"work": tmp_path / "work", "work_quota_gb": 1}
    *_, kept = judge(measured(planned, StorageConfig.model_validate(config)))
    assert kept.level == Level.OK
    assert f"goes on {day}; finished work comes back from {tmp_path}/work/abf-results/" in kept.text


def test_budget_and_doctor_show_it(
    plan: Callable[..., Plan], tmp_path: Path, records: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
):  # fmt: skip
    (tmp_path / "work").mkdir()
    config = StorageConfig(work=tmp_path / "work", work_quota_gb=1e-6)
    site = SITE.model_copy(update={"storage": config})
    monkeypatch.setattr("abf.budget.load_site", lambda: site)
    planned = plan()
    show_budget(planned.results, None, None)
    said = capsys.readouterr().out
    assert "storage   0.0 MB in " in said
    assert "  no size measured yet of 1 fetch" in said
    assert f"  WARNING: {2 * 4 * PARAMETERS / 1e6:.1f} MB to come in {tmp_path}/work" in said
    before = {path for path in tmp_path.rglob("*")}
    fresh = Plan(planned.study, tmp_path / "not written")
    for results, known in ((planned.results, None), (fresh.results, fresh)):
        found = list(sizes(results, site, known))
        assert [f.level for f in found] == [Level.OK, Level.FAIL]
        assert "MB too many; delete there" in found[1].text
    assert before == {path for path in tmp_path.rglob("*")}
    assert list(sizes(tmp_path / "nothing", site, None)) == []
