"""What is wrong with a training's rows, or with a step, in words."""

from __future__ import annotations

import math
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abf.artifacts import PIECES, read_table
from abf.data.loader import PackedRows
from abf.errors import ArtifactError
from abf.model.transformer import Transformer
from abf.train.parallel import World


def no_numbers(world: World, local: Mapping[str, float]) -> tuple[str, list[int]]:
    """Which term was no number on which rank, in words, and those ranks (all ranks call it).

    Args:
        world: the ranks.
        local: this rank's terms.
    """
    faults = [f"{name} is {value}" for name, value in local.items() if not math.isfinite(value)]
    found = world.gather((socket.gethostname(), faults))
    told = [
        f"{' and '.join(faults)} on rank {rank} of {world.size} ({host})"
        if world.size > 1
        else " and ".join(faults)
        for rank, (host, faults) in enumerate(found)
        if faults
    ]
    ranks = [rank for rank, (_, faults) in enumerate(found) if faults]
    return "".join(f" ({text})" for text in told), ranks


def told_rows(packed: PackedRows, rows: NDArray[np.int64], path: Path) -> str:
    """Numbers of packed rows, and the documents in them."""
    pieces = np.unique(packed.rows(rows).document_id)
    return (
        f"rows {_listed(rows.tolist())} of {path}, documents "
        f"{_documents(path, pieces[pieces >= 0])}"
    )


def check_fit(rows: PackedRows, model: Transformer, path: Path) -> None:
    """Refuse packed rows that a model cannot be trained on: an ArtifactError."""
    config = model.config
    if rows.vocab_size != config.vocab_size:
        raise ArtifactError(
            f"{path} was packed with a vocabulary of {rows.vocab_size}, the model has "
            f"{config.vocab_size}: pack with the model's tokenizer"
        )
    if rows.max_block > config.max_block:
        raise ArtifactError(
            f"{path} has blocks of up to {rows.max_block} tokens, the model's length head knows "
            f"{config.max_block}: convert with the same pack settings"
        )
    if rows.row_length > config.max_positions:
        raise ArtifactError(
            f"{path} has rows of {rows.row_length} tokens, the model {config.max_positions} "
            "positions: pack shorter rows"
        )
    if not len(rows):
        raise ArtifactError(f"{path} holds no row: the training split is empty")


def _documents(packed: Path, pieces: NDArray[np.int64]) -> str:
    """Names of the documents behind piece numbers, or the numbers when there is no piece table."""
    table = packed.with_name(f"{packed.stem}.pieces.parquet")
    names = [str(piece) for piece in pieces]
    if table.exists():
        known = read_table(table, PIECES).select(["document_id", "doc_id"]).to_pylist()
        by_number = {row["document_id"]: row["doc_id"] for row in known}
        names = list(dict.fromkeys(by_number[int(piece)] for piece in pieces))
    return _listed(names)


def _listed(names: Sequence[object], most: int = 20) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(str, names[:most])) + more
