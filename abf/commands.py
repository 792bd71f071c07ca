"""What each stage command does: open the planned directory, call one room, return its counts."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from abf.base import SEEDS
from abf.errors import ArtifactError
from abf.files import lock
from abf.job import Job, plan_of
from abf.site import load_node
from abf.stage import StageRun, declare, stage
from abf.stages import CONFIG, SO_FAR


def fetch(job: Job, run: StageRun) -> dict[str, Any]:
    """Get a source's text (package, standard library, local files, hub) and store it as Parquet."""
    from abf.data.config import Source
    from abf.data.sources import fetch

    return fetch(job.setting("source", Source), run.staging)


def prepare(job: Job, run: StageRun) -> dict[str, Any]:
    """Clean, deduplicate exactly, and split by document."""
    from abf.data.config import PrepareConfig
    from abf.data.prepare import prepare

    return prepare(job.setting("prepare", PrepareConfig), job.inputs("raw"), run.staging)


def tokenizer(job: Job, run: StageRun) -> dict[str, Any]:
    """Train a byte-level BPE, or take the imported checkpoint's tokenizer."""
    from abf.data.config import Tokenizer
    from abf.data.tokenizer import make_tokenizer

    return make_tokenizer(job.setting("tokenizer", Tokenizer), job.input("source"), run.staging)


def tokenize(job: Job, run: StageRun) -> dict[str, Any]:
    """Turn documents into token ids with character and byte offsets."""
    from abf.data.tokenize import tokenize

    return tokenize(job.input("documents"), job.input("tokenizer"), run.staging)


def segment(job: Job, run: StageRun) -> dict[str, Any]:
    """Cut documents into segments at token boundaries."""
    from abf.segment.base import segment
    from abf.segment.config import Segmenter

    reference = job.input("reference") if "reference" in job.document["inputs"] else None
    return segment(
        job.setting("segmenter", Segmenter),
        job.input("documents"),
        job.input("tokens"),
        run.staging,
        reference,
        job.document["config"].get("max_block"),
    )


def pack(job: Job, run: StageRun) -> dict[str, Any]:
    """Pack documents and their blocks into fixed rows."""
    from abf.data.config import PackConfig
    from abf.data.pack import pack

    cfg = job.setting("pack", PackConfig)
    return pack(
        cfg, job.input("tokens"), job.input("segments"), job.input("tokenizer"), run.staging
    )


def base(job: Job, run: StageRun) -> dict[str, Any]:
    """Make the AR base model: train it from scratch, or import a checkpoint."""
    from abf.train.config import Base

    cfg = job.setting("base", Base)
    if cfg.kind == "import":
        from abf.model.convert import import_checkpoint

        return import_checkpoint(cfg, run.staging)
    from abf.data.loader import PackedRows
    from abf.model.huggingface import save_hf
    from abf.model.store import new_model
    from abf.track.system import system_samples
    from abf.train.loop import train

    rows = job.input("packed") / "packed" / "train.arrow"
    packed = PackedRows(rows)
    model = new_model(
        cfg.shape,
        vocab_size=packed.vocab_size,
        document_id=packed.document_token,
        max_block=packed.max_block,
        max_positions=packed.row_length,
        seed=cfg.seed,
    )
    with system_samples(run.directory):
        result = train(
            cfg.train,
            # Arms have seeds below this: none of them begins with the rows its base began with.
            seed=cfg.seed + SEEDS,
            model=model,
            packed=rows,
            run_dir=run.directory,
            label=f"base {job.directory.name}",
            accept=job.accept,
            peak_tflops=job.peak_tflops(),
        )
    if not result.first:
        return {}
    save_hf(result.model, run.staging / "base")
    return {
        "parameters": sum(p.numel() for p in result.model.parameters()),
        "steps": result.steps,
        "tokens": result.tokens,
        "train_s": result.seconds,
    }


def convert(job: Job, run: StageRun) -> dict[str, Any]:
    """Convert the AR base to a block model and report that it is still the same AR model."""
    from abf.data.config import PackConfig
    from abf.model.convert import convert

    cfg = job.setting("pack", PackConfig)
    return convert(job.input("base"), job.input("packed"), cfg, run.staging)


def train(job: Job, run: StageRun) -> dict[str, Any]:
    """Train one cell; resumes from its last checkpoint, checkpoints on TERM, USR1 and Ctrl-C."""
    from abf.artifacts import METRICS, write_table
    from abf.model.store import load_model, save_model
    from abf.track.journal import metrics_table
    from abf.track.system import system_samples
    from abf.train.config import TrainConfig
    from abf.train.loop import train

    with system_samples(run.directory):
        result = train(
            job.setting("train", TrainConfig),
            seed=job.setting("seed"),
            model=load_model(job.input("init") / "init"),
            packed=job.input("packed") / "packed" / "train.arrow",
            run_dir=run.directory,
            label=f"train {job.directory.name}",
            accept=job.accept,
            peak_tflops=job.peak_tflops(),
        )
    if not result.first:
        return {}
    save_model(result.model, run.staging / "model")
    metrics = metrics_table(run.directory / "journal.jsonl")
    write_table(run.staging / "metrics.parquet", metrics, METRICS)
    return {"steps": result.steps, "tokens": result.tokens, "train_s": result.seconds}


def decode(job: Job, run: StageRun) -> dict[str, Any]:
    """Generate text for a task with one decoder, and log every event."""
    from abf.decode.config import DecoderConfig
    from abf.decode.task import decode_task
    from abf.eval.config import Task

    counts = decode_task(
        job.setting("task", Task),
        job.setting("decoder", DecoderConfig),
        **_reading(job),
        seed=job.setting("seed"),
        model_dir=job.input("train") / "model",
        packed=job.input("packed"),
        tokenizer=job.input("tokenizer") / "tokenizer",
        out=run.staging,
        label=f"decode {job.document['key']}",
    )
    run.extra["energy_j"] = counts.get("joules")
    run.extra["energy_source"] = counts.get("energy_source", "not measured")
    return counts


def score(job: Job, run: StageRun) -> dict[str, Any]:
    """Score one cell: likelihood on held-out text, and its generations."""
    from abf.decode.config import DecoderConfig
    from abf.eval.config import ScoringConfig, Task
    from abf.eval.score import score
    from abf.train.config import Objective

    return score(
        job.setting("tasks", dict[str, Task]),
        job.setting("decoders", dict[str, DecoderConfig]),
        job.setting("scoring", ScoringConfig),
        run=job.document["key"],
        arm=job.setting("arm"),
        seed=job.setting("seed"),
        objective=job.setting("objective", Objective),
        model_dir=job.input("train") / "model",
        base_dir=job.input("base") / "base",
        packed=job.input("packed"),
        decodes={path.name.rpartition("-")[0]: path for path in job.inputs("decodes")},
        tokenizer=job.input("tokenizer") / "tokenizer",
        out=run.staging,
        label=f"score {job.document['key']}",
    )


def ledger(job: Job, run: StageRun) -> dict[str, Any]:
    """Collect one row per job attempt of the study."""
    from abf.ledger.build import build_ledger
    from abf.ledger.slurm import scheduled_rows

    places = plan_of(job)["stages"]
    rows = scheduled_rows(job.results, places, node=load_node())
    return build_ledger(
        job.results, [job.results / place for place in places], run.staging, scheduled=rows
    )


def report(job: Job, run: StageRun) -> dict[str, Any]:
    """Write the self-contained report page and its figures."""
    from abf.report.config import ReportConfig
    from abf.report.page import build_report
    from abf.study import report_plan

    cfg = job.setting("report", ReportConfig)
    plan = report_plan(plan_of(job), job.results, ledger=job.input("ledger"), config=cfg)
    counts = build_report(plan, run.staging)
    shutil.rmtree(run.directory / SO_FAR, ignore_errors=True)  # the whole is here
    return counts


def mlflow(job: Job, run: StageRun) -> dict[str, Any]:
    """Fill the MLflow store from the files of the study (idempotent)."""
    from abf.artifacts import LEDGER, read_table
    from abf.files import write_json
    from abf.study import ingest_study

    rows = read_table(job.input("ledger") / "ledger.parquet", LEDGER).to_pylist()
    counts = ingest_study(plan_of(job), job.results, rows)
    write_json(run.staging / "ingested.json", counts)
    return counts


STAGE_COMMANDS: dict[str, Callable[[Job, StageRun], dict[str, Any]]] = {
    function.__name__: function
    for function in (
        fetch, prepare, tokenizer, tokenize, segment, pack, base, convert, train, decode, score,
        ledger, report, mlflow,
    )
}  # fmt: skip


def _reading(job: Job) -> dict[str, Any]:
    """How the trained model is read: an AR model is its own clean stream, shifted."""
    objective = job.setting("objective")
    if objective["kind"] == "ar":
        return {"shift": True}
    loss = objective["loss"]
    return {"shift": loss["shift"], "clean_stream": loss["clean_stream"]}


def run_stage(name: str, path: Path, *, declared: bool = True, accept: Sequence[str] = ()) -> None:
    """Run one stage directory to its manifest; finished work is only declared again.

    Args:
        declared: give the manifest its declared name (see `abf.stage.stage`).
        accept: see `Job.accept`.
    """
    job = Job.open(name, path, accept)
    directory, inputs = job.directory, job.all_inputs()
    config = directory / CONFIG
    with lock(directory, f"abf {name}"):
        try:
            finished = job.finished()
        except ArtifactError:  # an input is not whole: the attempt below says so, on record
            finished = False
        if finished:
            if declared:
                print(f"{directory} was finished before, from these very inputs: declared again")
                declare(directory)
            return
    with stage(
        name, directory, inputs=inputs, config=config, cores=job.cores(), declared=declared
    ) as run:
        run.counts = STAGE_COMMANDS[name](job, run)


def follow_stage(name: str, path: Path, *, accept: Sequence[str] = ()) -> None:
    """Take part in a distributed stage as another rank than the first, which writes everything."""
    job = Job.open(name, path, accept)
    if job.finished():  # the first rank only says so
        return
    STAGE_COMMANDS[name](job, StageRun(job.directory))
