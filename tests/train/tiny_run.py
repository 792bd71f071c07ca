"""A tiny run from nothing: random model, packed rows written by hand, `train` to the end.

As a command it is what the tests kill, stop and start again:
    python tests/train/tiny_run.py RUN_DIR '{"tokens": 4096}'
Letters: V vocabulary, L row length.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from abf.artifacts import PIECES, packed_schema, write_table
from abf.errors import AbfError
from abf.model.config import ModelConfig
from abf.model.transformer import Transformer
from abf.train.config import TrainConfig
from abf.train.loop import TrainResult, train

V, L, S = 61, 48, 8
DOCUMENT = 0


def write_rows(directory: Path, *, rows: int = 12, seed: int = 0) -> Path:
    """Rows of two or three pieces with blocks of 1..S tokens and some padding; returns the path."""
    rng = np.random.default_rng(seed)
    columns: dict[str, list[list[int]]] = {"token_ids": [], "block_id": [], "document_id": []}
    pieces: list[dict[str, Any]] = []
    for row in range(rows):
        tokens, blocks, documents, block = [], [], [], 0
        while (room := L - len(tokens)) > 6:
            length = int(min(room, rng.integers(6, 30)))
            start = len(tokens)
            tokens += [DOCUMENT, *rng.integers(1, V, length - 1).tolist()]
            blocks.append(block)
            left = length - 1
            while left:
                size = int(min(left, rng.integers(1, S + 1)))
                block, left = block + 1, left - size
                blocks += [block] * size
            block += 1
            number = len(pieces)
            documents += [number] * length
            pieces.append(
                {
                    "document_id": number,
                    "doc_id": f"text-{number}",
                    "part": 0,
                    "row": row,
                    "start": start,
                    "n_tokens": length,
                    "n_bytes": length,
                    "n_blocks": 1,
                }
            )
        padding = L - len(tokens)
        columns["token_ids"].append(tokens + [DOCUMENT] * padding)
        columns["block_id"].append(blocks + [-1] * padding)
        columns["document_id"].append(documents + [-1] * padding)
    directory.mkdir(parents=True, exist_ok=True)
    metadata = {"row_length": L, "max_block": S, "vocab_size": V, "document_id": DOCUMENT}
    schema = packed_schema(L, {name: str(value) for name, value in metadata.items()})
    table = pa.table(
        [pa.array(columns[field.name], type=field.type) for field in schema], schema=schema
    )
    path = directory / "train.arrow"
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        writer.write_table(table)
    write_table(directory / "train.pieces.parquet", pa.Table.from_pylist(pieces, PIECES), PIECES)
    return path


def new_model(seed: int = 0) -> Transformer:
    """About 20,000 random weights."""
    config = ModelConfig(
        vocab_size=V, d_model=32, layers=2, heads=4, kv_heads=2, head_dim=8, d_ff=64, max_block=S
    )
    model = Transformer(config)
    model.initialise(torch.Generator().manual_seed(seed))
    return model


def tiny_config(**changes: Any) -> TrainConfig:
    """Ten steps of four rows, a checkpoint every three, a record every two."""
    settings = {
        "tokens": 10 * 4 * L,
        "batch_rows": 4,
        "precision": "fp32",
        "checkpoint_steps": 3,
        "log_steps": 2,
    }
    return TrainConfig.model_validate(settings | changes)


def tiny_train(
    directory: Path,
    changes: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    accept: Collection[str] = (),
) -> TrainResult:
    """Train in `directory`, whose packed rows are written the first time."""
    packed = directory / "train.arrow"
    if not packed.exists():
        write_rows(directory)
    return train(
        tiny_config(**(changes or {})),
        seed=seed,
        model=new_model(),
        packed=packed,
        run_dir=directory,
        label="tiny",
        accept=accept,
    )


def main() -> int:
    """Run as a command; a user's error becomes a line and its exit code, as in `abf.cli`."""
    try:
        result = tiny_train(Path(sys.argv[1]), json.loads(sys.argv[2]))
    except AbfError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"done: {result.steps} steps")
    return 0


if __name__ == "__main__":
    sys.exit(main())
