"""From raw text to the report through Snakemake: what runs, what reruns, what survives."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pyarrow.parquet as pq
import pytest

from abf.artifacts import LEDGER, METRICS, SCORES, check_schema, read_manifest
from abf.stages import STAGES
from abf.track.attempts import read_attempts
from tests.train.equality import CLOCKS
from tests.workflow.conftest import GRID, RUN, Project, write_study


def planned(text: str) -> dict[str, int]:
    """Job counts by rule of a dry-run."""
    table = text.rpartition("Job stats:")[2]
    found = {m[1]: int(m[2]) for m in re.finditer(r"^(\w+) +(\d+)$", table, re.MULTILINE)}
    found.pop("total", None)
    found.pop("all", None)
    return found


def wait_for(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Until the condition holds; fails when the process ends first."""
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)


def start(project: Project) -> subprocess.Popen[str]:
    """Snakemake in a process group of its own, as a terminal would start it."""
    return subprocess.Popen(
        project.command(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # A shell that starts us in the background has SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def forget(project: Project, *stages: str) -> None:
    """Take the stages' directories away, plans excepted."""
    for stage in stages:
        for manifest in (project.results / stage).rglob("manifest.json"):
            directory = manifest.parent
            config = (directory / "config.json").read_text()
            times = (directory / "config.json").stat()
            shutil.rmtree(directory)
            directory.mkdir()
            (directory / "config.json").write_text(config)
            os.utime(directory / "config.json", ns=(times.st_atime_ns, times.st_mtime_ns))


def long_training(project: Project, tokens: int) -> Path:
    """Leave one training to do, long enough to be caught in the act; its directory."""
    run = RUN.replace("tokens: 5000", f"tokens: {tokens}").replace("log_steps: 1", "log_steps: 5")
    write_study(
        project.folder,
        GRID.replace("  fixed: {segmenter: {kind: fixed, like: {kind: sentence}}}\n", ""),
        run,
    )
    done = project.run("-n")
    assert planned(done.stdout)["train"] == 1, done.stdout
    new = [p for p in (project.results / "train").iterdir() if not (p / "manifest.json").exists()]
    (directory,) = new
    return directory


def curve(directory: Path) -> list[tuple[object, ...]]:
    """Deterministic metrics of a finished run."""
    rows = pq.read_table(directory / "metrics.parquet").to_pylist()
    return [
        (r["step"], r["tokens"], r["name"], r["value"]) for r in rows if r["name"] not in CLOCKS
    ]


def weights(directory: Path) -> bytes:
    return (directory / "model" / "model.safetensors").read_bytes()


def test_the_study_ends_in_a_report_a_ledger_and_scores(finished: Project) -> None:
    page = (finished.results / "report" / "micro" / "index.html").read_text()
    assert "sentence" in page
    assert "fixed" in page
    ledger = pq.read_table(finished.results / "ledger" / "micro" / "ledger.parquet")
    check_schema(ledger.schema, LEDGER, Path("ledger"))
    rules = set(ledger.column("rule").to_pylist())
    assert {"fetch", "tokenize", "base", "convert", "train", "decode", "score"} <= rules
    for path in (finished.results / "score").glob("*/scores.parquet"):
        check_schema(pq.read_schema(path), SCORES, path)
    for path in (finished.results / "train").glob("*/metrics.parquet"):
        check_schema(pq.read_schema(path), METRICS, path)
    for stage in STAGES:
        for manifest in (finished.results / stage).rglob("[!.]*/manifest.json"):
            read_manifest(manifest, stage)
    assert list(finished.results.rglob(".staging")) == []
    assert list(finished.results.rglob("*.tmp")) == []


def test_the_same_command_again_does_nothing(finished: Project) -> None:
    done = finished.run()
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout


def test_a_new_seed_runs_only_its_own_cells(copy: Project) -> None:
    write_study(copy.folder, GRID.replace("[0]", "[0, 1]"))
    assert planned(copy.run("-n").stdout) == {
        "train": 2, "decode": 2, "score": 2, "ledger": 1, "report": 1, "mlflow": 1,
    }  # fmt: skip


def test_a_learning_rate_reruns_nothing_before_training(copy: Project) -> None:
    write_study(copy.folder, GRID.replace("sentence: {}", "sentence: {train.optim.lr: 0.01}"))
    assert planned(copy.run("-n").stdout) == {
        "train": 1, "decode": 1, "score": 1, "ledger": 1, "report": 1, "mlflow": 1,
    }  # fmt: skip


def test_a_decoder_reruns_no_training(copy: Project) -> None:
    write_study(copy.folder, GRID, RUN.replace("threshold: 0.5", "threshold: 0.7"))
    assert planned(copy.run("-n").stdout) == {
        "decode": 2, "score": 2, "ledger": 1, "report": 1, "mlflow": 1,
    }  # fmt: skip


def test_a_bumped_stage_version_reruns_it_and_what_follows(copy: Project) -> None:
    code = (
        "import dataclasses, sys\nfrom abf.stages import STAGES\n"
        "STAGES['segment'] = dataclasses.replace(STAGES['segment'], version=99)\n"
        "from snakemake.cli import main\nmain(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, *copy.command("-n")[3:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    jobs = planned(done.stdout)
    assert {"fetch", "prepare", "tokenizer", "tokenize"} & jobs.keys() == set()
    assert {"segment", "pack", "base", "convert", "train", "decode", "score"} <= jobs.keys()


def test_a_killed_training_gives_the_same_curve(copy: Project, tmp_path: Path) -> None:
    directory = long_training(copy, 60_000)
    reference = tmp_path / "uninterrupted"
    shutil.copytree(copy.folder, reference)
    done = Project(reference).run()
    assert done.returncode == 0, done.stdout

    process = start(copy)
    wait_for(lambda: list(directory.glob("ckpt/step-*")), process)
    os.kill(read_attempts(directory)[-1]["pid"], signal.SIGKILL)
    output, _ = process.communicate()
    assert process.returncode != 0, output
    done = copy.run()
    assert done.returncode == 0, done.stdout
    states = [(a["attempt"], a["state"]) for a in read_attempts(directory)]
    assert states == [(1, "RUNNING"), (2, "RUNNING"), (2, "COMPLETED")]
    same = reference / directory.relative_to(copy.folder)
    assert curve(directory) == curve(same)
    assert weights(directory) == weights(same)
    ledger = pq.read_table(copy.results / "ledger" / "micro" / "ledger.parquet").to_pylist()
    killed = [row for row in ledger if row["run"] == directory.name and row["rule"] == "train"]
    assert [row["state"] for row in killed] == ["KILLED", "COMPLETED"]


def test_a_killed_driver_and_ctrl_c_lose_nothing(copy: Project) -> None:
    # Twice as long as it takes to start a driver: both signals must meet it at work.
    directory = long_training(copy, 200_000)
    process = start(copy)
    wait_for(lambda: list(directory.glob("ckpt/step-*")), process)
    second = copy.run()
    assert second.returncode != 0
    assert f"process {process.pid} on " in second.stdout

    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    before = {path.name for path in directory.glob("ckpt/step-*")}
    assert before

    process = start(copy)
    wait_for(lambda: {p.name for p in directory.glob("ckpt/step-*")} - before, process)
    # The logger hears the signal first, the order that once made the job fail on a broken pipe.
    loggers = [p for p in psutil.Process(process.pid).children(recursive=True) if p.name() == "tee"]
    assert loggers
    for logger in loggers:
        logger.send_signal(signal.SIGTERM)
        logger.send_signal(signal.SIGINT)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate()
    assert process.returncode != 0
    assert not (directory / "manifest.json").exists()

    done = copy.run()
    assert done.returncode == 0, done.stdout
    states = [a["state"] for a in read_attempts(directory)]
    assert states[:3] == ["RUNNING", "RUNNING", "INTERRUPTED"]
    assert states[-1] == "COMPLETED"
    assert read_manifest(directory)["counts"]["steps"] > 0


def test_a_deleted_payload_is_named(copy: Project) -> None:
    tokens = copy.directory("tokenize", "tokens")
    (tokens / "tokens" / "train-00000.parquet").unlink()
    write_study(copy.folder, GRID, RUN.replace("max_block: 16", "max_block: 12"))
    done = copy.run()
    assert done.returncode != 0
    assert "train-00000.parquet is missing" in done.stdout


def test_a_truncated_artifact_is_named(copy: Project) -> None:
    model = next(copy.directory("train", "sentence").glob("model/*.safetensors"))
    os.truncate(model, model.stat().st_size // 2)
    write_study(copy.folder, GRID, RUN.replace("threshold: 0.5", "threshold: 0.7"))
    done = copy.run()
    assert done.returncode != 0
    assert re.search(r"model\.safetensors has \d+ bytes, its manifest says \d+", done.stdout)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("max_documents: 16", "max_documents: 0"), "sources[0].max_documents"),
        (('"[a-f]*.py"', '"nothing-*.py"'), "nothing-*.py"),
        (("train:\n", "trian:\n"), "did you mean 'train'"),
        (("kind: length_head", "kind: length_hed"), "length_hed"),
    ],
)
def test_bad_input_stops_with_its_name(
    tmp_path: Path, change: tuple[str, str], message: str
) -> None:
    write_study(tmp_path, GRID, RUN.replace(*change))
    done = Project(tmp_path).run()
    assert done.returncode != 0
    assert message in done.stdout


def test_parsing_the_workflow_imports_no_torch_and_no_mlflow(finished: Project) -> None:
    code = (
        "import sys\nfrom snakemake.cli import main\n"
        "try: main(sys.argv[1:])\nexcept SystemExit: pass\n"
        "print('heavy:', [m for m in ('torch', 'mlflow', 'transformers') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, *finished.command("-n")[3:]]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert "heavy: []" in done.stdout


def test_a_stage_can_be_typed_by_hand(finished: Project) -> None:
    directory = finished.directory("segment", "fixed")
    before = read_manifest(directory)["files"]
    done = subprocess.run(
        [sys.executable, "-m", "abf.cli", "segment", str(directory)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert read_manifest(directory)["files"] == before
    config = json.loads((directory / "config.json").read_text())
    assert config["inputs"]["reference"].startswith("segment/sentence-")
