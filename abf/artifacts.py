"""Every file of the pipeline: Arrow schema, manifest, and publishing; stages are in stages.py.

A stage directory is `results/{stage}/{key}/`. It holds `config.json` (what the stage reads of the
configuration, written by the planner), the payload named in `stages.STAGES`, and `manifest.json`,
written last: a directory without a manifest is unfinished. Imports neither torch nor mlflow.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from abf.documents import parse_document
from abf.errors import ArtifactError
from abf.files import atomic_path, fsync_path, sha256
from abf.stages import MANIFEST, stage_dir

_i32, _i64, _f32, _f64, _str = pa.int32(), pa.int64(), pa.float32(), pa.float64(), pa.string()


def _schema(*fields: tuple[str, pa.DataType]) -> pa.Schema:
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in fields])


DOCUMENTS = _schema(
    ("doc_id", _str),
    ("text", pa.large_string()),
    ("source", _str),
    ("licence", _str),
    ("language", _str),
)
"""`documents/{split}-{shard:05d}.parquet`, split in {train, heldout}."""

TOKENS = _schema(
    ("doc_id", _str),
    ("token_ids", pa.list_(pa.uint32())),
    ("char_start", pa.list_(pa.uint32())),
    ("byte_start", pa.list_(pa.uint32())),
    ("n_bytes", _i64),
)
"""`tokens/{split}-{shard:05d}.parquet`: text tokens only, no special tokens; starts are offsets of
each token in characters and in UTF-8 bytes; n_bytes is the document's length in bytes."""

SEGMENTS = _schema(
    ("doc_id", _str),
    ("segment_start", pa.list_(pa.uint32())),
    ("boundary_score", pa.list_(_f32)),
    ("level", pa.list_(pa.uint8())),
)
"""`segments/{split}-{shard:05d}.parquet`, one row a document in the order of the tokens: token
index where each segment starts (first 0), its score, its nesting level (0 leaf, 1 paragraph)."""


def packed_schema(row_length: int, metadata: Mapping[str, str]) -> pa.Schema:
    """`packed/{split}.arrow` (IPC file): rows of L = `row_length` tokens.

    document_id is the piece's number in the split (see PIECES), -1 on padding. The first token of a
    piece is the document token: context only, never predicted. block_id grows along the row, is
    unique in it, and is -1 on padding; the document token is a block of its own.
    """

    def fixed(kind: pa.DataType) -> pa.DataType:
        return pa.list_(kind, row_length)

    return pa.schema(
        [
            pa.field("token_ids", fixed(pa.uint32()), nullable=False),
            pa.field("block_id", fixed(_i32), nullable=False),
            pa.field("document_id", fixed(_i32), nullable=False),
        ],
        metadata=dict(metadata),
    )


PIECES = _schema(
    ("document_id", _i32),
    ("doc_id", _str),
    ("part", _i32),
    ("row", _i32),
    ("start", _i32),
    ("n_tokens", _i32),
    ("n_bytes", _i64),
    ("n_blocks", _i32),
)
"""`packed/{split}.pieces.parquet`: where each packed piece of a document lies. n_tokens counts its
slots: document token, text, and the closing document token on a document's last part."""

METRICS = _schema(
    ("step", _i64), ("tokens", _i64), ("name", _str), ("value", _f64), ("wall_s", _f64)
)

SAMPLES = _schema(
    ("request", _i32),
    ("prompt_id", _str),
    ("prompt", pa.large_string()),
    ("text", pa.large_string()),
    ("prompt_ids", pa.list_(pa.uint32())),
    ("token_ids", pa.list_(pa.uint32())),
    ("block_length", pa.list_(_i32)),
    ("nfe", _i32),
    ("positions", _i64),
    ("finished", pa.bool_()),
    ("wall_s", _f64),
)
"""`decode/.../samples.parquet`: token_ids are the new tokens only; nfe counts forwards this request
took part in (prefill apart); positions are query rows processed for it; wall_s is its share."""

EVENTS = _schema(
    ("request", _i32),
    ("block", _i32),
    ("step", _i32),
    ("nfe", _i32),
    ("seq", _i64),
    ("type", _str),
    ("uid", _i32),
    ("left_uid", _i32),
    ("old_id", _i32),
    ("new_id", _i32),
    ("prob", _f32),
    ("gate", _f32),
    ("entropy", _f32),
    ("threshold", _f32),
    ("length", _i32),
    ("alt_ids", pa.list_(_i32)),
    ("alt_probs", pa.list_(_f32)),
    ("state_hash", _str),
    ("wall_s", _f64),
)
"""`decode/.../trace.arrows` (IPC stream, flushed per block): types and their fields are in
`abf.decode.events`; gate is the edit heads' word beside prob (probability, or tokens missing); -1
and NaN stand for "does not apply"."""

SCORES = pa.schema(
    [
        pa.field("run", _str, nullable=False),
        pa.field("arm", _str, nullable=False),
        pa.field("seed", _i32, nullable=False),
        pa.field("task", _str, nullable=False),
        pa.field("task_version", _i32, nullable=False),
        pa.field("decoder", _str, nullable=False),
        pa.field("metric", _str, nullable=False),
        pa.field("unit", _str, nullable=False),
        pa.field("value", _f64),
        pa.field("ci_low", _f64),
        pa.field("ci_high", _f64),
        pa.field("interval", _str, nullable=False),
        pa.field("n", _i64, nullable=False),
        pa.field("note", _str, nullable=False),
    ]
)
"""Tidy: one figure a row; interval names what was resampled (`documents`, or `none`); value is null
when it was not measured and `note` says so."""

DOCUMENT_SCORES = _schema(
    ("task", _str),
    ("decoder", _str),
    ("metric", _str),
    ("document", _str),
    ("numerator", _f64),
    ("denominator", _f64),
)
"""Per-document sums behind each ratio metric, so that intervals can be recomputed and pooled."""

LEDGER = pa.schema(
    [
        pa.field("cluster", _str, nullable=False),
        pa.field("job_id", _str, nullable=False),
        pa.field("submit_time", _str, nullable=False),
        pa.field("attempt", _i32, nullable=False),
        pa.field("rule", _str, nullable=False),
        pa.field("run", _str, nullable=False),
        pa.field("state", _str, nullable=False),
        pa.field("reason", _str, nullable=False),
        pa.field("nodes", _i32, nullable=False),
        pa.field("gpus", _i32, nullable=False),
        pa.field("elapsed_s", _f64, nullable=False),
        pa.field("node_hours", _f64),
        pa.field("gpu_hours", _f64),
        pa.field("core_hours", _f64),
        pa.field("energy_j", _f64),
        pa.field("energy_source", _str, nullable=False),
    ]
)


# --- reading -----------------------------------------------------------------------------------


def read_table(path: Path, schema: pa.Schema) -> pa.Table:
    """Read a Parquet file and hold it against its schema.

    Raises:
        ArtifactError: the file is missing, truncated, or has other columns; names them.
    """
    try:
        table = pq.read_table(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; rerun the stage that writes it") from None
    except (pa.ArrowInvalid, OSError) as error:
        raise ArtifactError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); it is truncated or no Parquet "
            "file: delete its stage directory and run the same command again"
        ) from error
    check_schema(table.schema, schema, path)
    return table


def check_schema(found: pa.Schema, expected: pa.Schema, path: Path) -> None:
    """Raise ArtifactError naming every column that differs."""
    if found.equals(expected, check_metadata=False):
        return
    have = {field.name: str(field.type) for field in found}
    want = {field.name: str(field.type) for field in expected}
    differences = [
        f"{name}: found {have.get(name, 'nothing')}, expected {want.get(name, 'nothing')}"
        for name in sorted(have.keys() | want.keys())
        if have.get(name) != want.get(name)
    ]
    raise ArtifactError(
        f"{path} has another schema: {'; '.join(differences) or 'column order or nullability'}"
    )


def read_manifest(directory: Path, stage: str | None = None) -> dict[str, Any]:
    """Manifest of a finished stage directory (or of the manifest file itself).

    Raises:
        ArtifactError: there is none, it is not JSON, another stage wrote it, or a listed file is
            missing, has another size, or another content.
    """
    directory = stage_dir(directory)
    path = directory / MANIFEST
    try:
        manifest = parse_document(path, path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(
            f"{directory} is unfinished: it has no {MANIFEST}; run its stage first"
        ) from None
    except ValueError as error:
        raise ArtifactError(
            f"{path} is damaged ({error}): delete {directory} and run the same command again"
        ) from error
    if stage is not None and manifest.get("stage") != stage:
        raise ArtifactError(f"{path} was written by {manifest.get('stage')!r}, not by {stage!r}")
    if wrong := damage(directory, manifest):
        raise ArtifactError(f"{wrong}; delete {directory} and run the same command again")
    return manifest


def damage(directory: Path, manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with the payload that a manifest lists; None if nothing is."""
    for name, entry in manifest["files"].items():
        file = directory / name
        if not file.exists():
            return f"{file} is missing, its manifest says {entry['bytes']} bytes"
        status = file.stat()
        if status.st_size != entry["bytes"]:
            return f"{file} has {status.st_size} bytes, its manifest says {entry['bytes']}"
        # Hashing a file that nobody wrote to since would cost a read of all data at every stage.
        if status.st_mtime_ns != entry.get("mtime_ns") and sha256(file) != entry["sha256"]:
            return f"{file} was changed after it was written: its hash is not its manifest's"
    return None


PlanDocument = Mapping[str, Any]
"""Content of a plan file, `results/plan/{study}.json`, as `Plan.write` left it."""


def read_plan(path: Path) -> PlanDocument:
    """A plan file.

    Raises:
        ArtifactError: there is none, or it is damaged.
    """
    try:
        return parse_document(path, path.read_bytes())
    except FileNotFoundError:
        raise ArtifactError(f"{path} does not exist; `abf plan STUDY.yaml` writes it") from None
    except ValueError as error:
        raise ArtifactError(
            f"{path} is damaged ({error}): `abf plan STUDY.yaml` writes it again; delete it if its "
            "study is no longer wanted"
        ) from None


def read_plans(results: Path) -> list[PlanDocument]:
    """The plans of all studies below a results folder, by name."""
    return [read_plan(path) for path in sorted((results / "plan").glob("*.json"))]


def shards(directory: Path, split: str, suffix: str = ".parquet") -> list[Path]:
    """Shard files of a split, in order.

    Raises:
        ArtifactError: there is none.
    """
    found = sorted(directory.glob(f"{split}-*{suffix}"))
    if not found:
        raise ArtifactError(f"{directory} holds no shard of split {split!r}")
    return found


# --- writing -----------------------------------------------------------------------------------


def write_table(path: Path, table: pa.Table, schema: pa.Schema) -> None:
    """Cast to the schema, hold it against it, write Parquet atomically."""
    table = table.select(schema.names).cast(schema)
    for field in schema:
        if not field.nullable and table.column(field.name).null_count:
            raise ArtifactError(f"{path}: column {field.name} holds nulls")
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary, compression="zstd")


def file_entries(directory: Path, names: tuple[str, ...]) -> dict[str, dict[str, Any]]:
    """Size, time and hash of every file of the payload, by path below the stage directory."""
    found: dict[str, dict[str, Any]] = {}
    for name in names:
        root = directory / name
        files = sorted(p for p in root.rglob("*") if p.is_file()) if root.is_dir() else [root]
        for file in files:
            if file.name == ".snakemake_timestamp":
                continue
            found[file.relative_to(directory).as_posix()] = {
                "bytes": file.stat().st_size,
                "mtime_ns": file.stat().st_mtime_ns,
                "sha256": sha256(file),
            }
    return found


def publish(staging: Path, directory: Path, names: tuple[str, ...]) -> None:
    """Flush what a stage wrote below `staging` and move it to its final names."""
    for name in names:
        source, target = staging / name, directory / name
        if not source.exists():
            raise ArtifactError(f"the stage wrote no {name} (looked in {staging})")
        for path in sorted(source.rglob("*"), reverse=True) if source.is_dir() else []:
            fsync_path(path)
        fsync_path(source)
        if target.is_dir():
            shutil.rmtree(target)
        os.replace(source, target)
    fsync_path(directory)
