"""Results on scratch, emptied between two runs: the same command goes on from the kept copies."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import Counter

import pytest

from abf.cli import main
from abf.cluster import slurm
from abf.cluster.config import StorageConfig
from abf.cluster.history import Attempt
from abf.cluster.jobs import rule_comment
from abf.grid import load_study
from abf.keeping.store import Store
from abf.ledger.build import ledger_rows
from abf.ledger.slurm import kept_records, slurm_rows, store_records
from abf.ledger.storage import measure_storage
from abf.plan import Plan
from abf.seeing.planned import read_planned
from abf.stages import MANIFEST
from abf.track.attempts import read_attempts
from tests.workflow.conftest import GRID, RESULTS, RUN, Project, write_study
from tests.workflow.test_seeing import rerun
from tests.workflow.test_workflow import planned, weights


@pytest.fixture
def kept(copy: Project, monkeypatch: pytest.MonkeyPatch) -> Store:
    """The finished study, its results linked to scratch, and a site with a project area."""
    base = copy.folder.parent
    for name in ("work", "scratch"):
        (base / name).mkdir()
    shutil.move(copy.results, base / "scratch")
    copy.results.symlink_to(base / "scratch" / RESULTS)
    site = base / "site.yaml"
    site.write_text(f"account: mine\nstorage: {{work: {base}/work, scratch: {base}/scratch}}\n")
    monkeypatch.setenv("ABF_SITE", str(site))
    done = copy.run()
    assert "Nothing to be done" in done.stdout
    store = Store.of(copy.results, StorageConfig(work=base / "work"))
    assert store is not None
    assert re.search(rf"^kept 20 directories of \d\S+ MB in {store.root}$", done.stdout, re.M)
    return store


def places(project: Project) -> tuple[str, ...]:
    return read_planned(project.results, project.folder / "grid.yaml").places


def times(project: Project) -> dict[str, int]:
    return {p: (project.results / p / MANIFEST).stat().st_mtime_ns for p in places(project)}


def attempts(project: Project) -> dict[str, int]:
    return {p: len(read_attempts(project.results / p)) for p in places(project)}


@pytest.mark.parametrize("records", ["snakemake's records kept", "all gone"])
def test_an_emptied_results_folder_is_restored_and_nothing_runs(
    copy: Project, kept: Store, records: str
) -> None:
    models = {p.name: weights(p) for p in (copy.results / "train").iterdir()}
    before, rows = times(copy), [
        row for p in places(copy) for row in ledger_rows(copy.results / p, run=p)
    ]  # fmt: skip
    shutil.rmtree(copy.folder.parent / "scratch")
    if records == "all gone":
        shutil.rmtree(copy.folder / ".snakemake")
    dry = copy.run("-n")
    assert dry.stdout.count("would first be restored: ") == 20
    done = copy.run()
    assert done.returncode == 0, done.stdout
    assert "Nothing to be done" in done.stdout
    named = set(re.findall(r"^restored (\w+/\S+) \([\d.]+ MB\) from ", done.stdout, re.M))
    assert named == set(places(copy))
    assert times(copy) == before
    assert {p.name: weights(p) for p in (copy.results / "train").iterdir()} == models
    assert [r for p in places(copy) for r in ledger_rows(copy.results / p, run=p)] == rows
    again = copy.run()
    assert "restored" not in again.stdout


SCORING = RUN.replace("max_rows: 4", "max_rows: 3")
"""Other scores of the same trainings and generations."""


def test_only_lost_work_runs_again_and_gives_the_same_model(copy: Project, kept: Store) -> None:
    """A model that was never copied, text and tokens that were; then a study that needs them."""
    train = copy.directory("train", "sentence")
    model, before = weights(train), attempts(copy)
    place = train.relative_to(copy.results).as_posix()
    shutil.rmtree(kept.root / place)
    (train / "model" / "model.safetensors").unlink()
    for stage in ("fetch", "prepare", "tokenize", "segment"):
        shutil.rmtree(copy.results / stage)
    write_study(copy.folder, GRID, SCORING)
    done = copy.run()
    assert done.returncode == 0, done.stdout[-5000:]
    assert f"lost: {place}: " in done.stdout
    assert "model.safetensors is missing, its manifest says" in done.stdout
    assert done.stdout.count("restored ") == 5
    # The lost model, from its checkpoint, and what is new. It came out the same, journal and all,
    # so what was generated with it stays, as does the other arm's model.
    ran = Counter(p.partition("/")[0] for p, n in attempts(copy).items() if n != before.get(p, 0))
    assert ran == {"train": 1, "score": 2, "ledger": 1, "report": 1, "mlflow": 1}
    assert weights(train) == model
    # What ran has been copied when the run was over.
    assert (kept.root / place / MANIFEST).read_bytes() == (train / MANIFEST).read_bytes()


def test_lost_data_behind_a_finished_training_is_made_again_and_nothing_is_trained(
    copy: Project, kept: Store
) -> None:
    """Snakemake waits for the training only, whose rows are gone; scoring reads both."""
    pack, tokens = copy.directory("pack", "fixed"), copy.directory("tokenize", "tokens")
    for directory in (pack, tokens):
        shutil.rmtree(directory)
        shutil.rmtree(kept.root / directory.relative_to(copy.results))
    before, models = attempts(copy), {p: weights(p) for p in (copy.results / "train").iterdir()}
    write_study(copy.folder, GRID, SCORING)
    done = copy.run()
    assert done.returncode == 0, done.stdout[-5000:]
    assert done.stdout.count("lost: ") == 2
    ran = Counter(p.partition("/")[0] for p, n in attempts(copy).items() if n != before.get(p, 0))
    others = {"ledger": 1, "report": 1, "mlflow": 1}
    assert ran == {"tokenize": 1, "pack": 1, "score": 2} | others
    assert {p: weights(p) for p in (copy.results / "train").iterdir()} == models
    assert "was finished before, from these very inputs: declared again" in done.stdout
    assert "Nothing to be done" in copy.run().stdout
    assert rerun(copy).needed == frozenset()
    # As it is now, times included, it comes back.
    shutil.rmtree(copy.folder.parent / "scratch")
    assert "Nothing to be done" in copy.run().stdout


REPORT = RUN.replace("generations: 1", "generations: 2")
"""Another page, the rest as it was."""


def test_a_copy_that_fails_fails_no_study(copy: Project, kept: Store) -> None:
    site = copy.folder.parent / "site.yaml"
    site.write_text(site.read_text().replace("scratch: ", "work_quota_gb: 0.002, scratch: "))
    write_study(copy.folder, GRID, REPORT)
    done = copy.run()
    assert done.returncode == 0, done.stdout[-5000:]
    why = r"WARNING: finished work was not copied: 2 finished directories of \d\S+ MB do not fit "
    assert re.search(rf"^{why}\S+: \d\S+ MB of 2.0 MB are used", done.stdout, re.M)


def test_a_study_that_fails_keeps_what_it_finished(
    copy: Project, kept: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "nowhere://at-all")
    write_study(copy.folder, GRID, REPORT)
    done = copy.run()
    assert done.returncode != 0
    assert "kept 1 directories of " in done.stdout, done.stdout[-5000:]
    page = "report/micro/index.html"
    assert (kept.root / page).read_bytes() == (copy.results / page).read_bytes()


def test_a_gc_leaves_the_books_as_they_are(
    copy: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An arm is given up, deleted, and planned again: what it cost was never forgotten."""
    monkeypatch.chdir(copy.folder)
    monkeypatch.setattr(slurm, "available", lambda: False)
    monkeypatch.setenv("ABF_SITE", str(copy.folder / "site.yaml"))
    (copy.folder / "site.yaml").write_text("account: mine\n")
    both, records = places(copy), {}
    for number, place in enumerate(both):
        record = Attempt("leonardo", str(number), "abf", rule_comment(place), "mine", number, 5, 65,
                         60, 5, "COMPLETED", "None", "0:0", 32.0, 1, 4, 32.0, 7.0)  # fmt: skip
        records[record.key] = record
    store_records(copy.results, records)

    def books() -> list[dict[str, object]]:
        own = [row for p in both for row in ledger_rows(copy.results / p, run=p)]
        kept = kept_records(copy.results).values()
        return own + slurm_rows(kept, both, copy.results, full_billing=32)

    before, models = books(), {p.name: weights(p) for p in (copy.results / "train").iterdir()}
    assert len(before) == 2 * len(both)
    arm = "  fixed: {segmenter: {kind: fixed, like: {kind: sentence}}}\n"
    write_study(copy.folder, GRID.replace(arm, ""))
    assert main(["plan", "grid.yaml", "--results", RESULTS]) == 0
    for path in copy.results.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time(), path.stat().st_mtime - 61 * 86400))
    capsys.readouterr()
    assert main(["gc", "--results", RESULTS, "--yes"]) == 0
    said = capsys.readouterr().out
    gone = {place for place in both if f"deleted {RESULTS}/{place}\n" in said}
    assert {p.partition("/")[0] for p in gone} == {"segment", "pack", "train", "decode", "score"}
    assert all("fixed" in place for place in gone)
    assert books() == before
    assert main(["gc", "--results", RESULTS]) == 0
    assert capsys.readouterr().out.endswith("0.0 MB may go\n")
    # What is left is whole: nothing of it runs again, and the arm can be had back.
    assert planned(copy.run("-n").stdout) == {"ledger": 1, "report": 1, "mlflow": 1}
    write_study(copy.folder, GRID, RUN.replace("threshold: 0.5", "threshold: 0.7"))
    assert planned(copy.run("-n").stdout) == {
        "segment": 1, "pack": 1, "train": 1, "decode": 2, "score": 2,
        "ledger": 1, "report": 1, "mlflow": 1,
    }  # fmt: skip
    (left,) = (p for p in (copy.results / "train").iterdir() if (p / MANIFEST).exists())
    assert weights(left) == models[left.name]


def test_the_forecast_of_a_trainings_size_is_what_trainings_had(copy: Project) -> None:
    write_study(copy.folder, GRID.replace("[0]", "[0, 1, 2]"))
    plan = Plan(load_study(copy.folder / "grid.yaml"), copy.results)
    documents = {i.place: plan.document(i) for i in plan.instances.values()}
    found = measure_storage(documents, copy.results, StorageConfig(), documents=documents)
    (train,) = (c for c in found.coming if c.stage == "train")
    assert (train.directories, train.measurements) == (4, 2)
    finished = list((copy.results / "train").glob("*/manifest.json"))
    parts = {"model metrics.parquet": train.payload, "ckpt": train.checkpoints}
    for names, forecast in parts.items():
        places = [m.parent / name for m in finished for name in names.split()]
        files = [f for path in places for f in (path, *path.rglob("*")) if f.is_file()]
        had = sum(f.stat().st_size for f in files) / len(finished)
        assert forecast / 4 == pytest.approx(had, rel=0.1), names
