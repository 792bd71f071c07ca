"""What a study takes from this disk, held against it before anything is submitted."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from abf.checked import in_file, leading_keys
from abf.config import RunConfig
from abf.data.local import matching_files
from abf.errors import ConfigError
from abf.grid import Study
from abf.model.config import DirectoryCheckpoint, ImportedBase

CHECKPOINT = ("config.json", "tokenizer.json")
"""Files that no checkpoint directory is without."""


def check_outside(study: Study) -> None:
    """Refuse sources and checkpoints that no job could use.

    Raises:
        ConfigError: one line a fault: the study's file, key, value, and what is wrong.
    """
    faults = (fault for cell in study.cells for fault in _faults(cell.config))
    where = in_file(study.path)
    if lines := [f"{where(leading_keys(fault))}: {fault}" for fault in dict.fromkeys(faults)]:
        raise ConfigError("\n".join(lines))


def _faults(cfg: RunConfig) -> Iterator[str]:
    for number, source in enumerate(cfg.sources):
        if source.kind == "local" and not matching_files(source.path):
            yield f"sources[{number}].path: no file matches {source.path!r}: correct it"
    if not isinstance(cfg.base, ImportedBase):
        return
    checkpoint = cfg.base.checkpoint
    if not isinstance(checkpoint, DirectoryCheckpoint):
        return
    folder = Path(checkpoint.path)
    if missing := [name for name in CHECKPOINT if not (folder / name).is_file()]:
        yield f"base.checkpoint.path: {checkpoint.path!r} has no {' and no '.join(missing)}"
        return
    try:
        found = json.loads((folder / CHECKPOINT[0]).read_bytes())
    except ValueError as error:
        yield f"base.checkpoint.path: {checkpoint.path!r}: {CHECKPOINT[0]} is not JSON ({error})"
        return
    for key in ("max_position_embeddings", "n_positions"):
        context = found.get(key) if isinstance(found, dict) else None
        if isinstance(context, int) and cfg.pack.row_length > context:
            yield (
                f"pack.row_length={cfg.pack.row_length} is longer than the context of "
                f"{checkpoint.path!r} ({key}={context}): lower it"
            )
