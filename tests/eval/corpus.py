"""A small packed corpus of real text, through the pipeline's own stages, and a model for it.

Text: functions of the Python standard library, which is always on disk. L row length, S longest
block. Every document ends with its closing token; some are longer than a row.
"""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch

from abf.artifacts import DOCUMENTS, write_table
from abf.base import ConfigModel
from abf.data.config import PackConfig, TrainedTokenizer
from abf.data.pack import pack
from abf.data.tokenize import tokenize
from abf.data.tokenizer import make_tokenizer
from abf.decode.config import DecoderConfig
from abf.decode.prompts import PromptTask
from abf.decode.task import decode_task
from abf.model.config import ShapeConfig
from abf.model.huggingface import save_hf
from abf.model.store import new_model, save_model
from abf.segment.base import segment

L, S = 96, 8
MODULES = ("bisect", "heapq", "textwrap", "shlex", "fnmatch")
SHAPE = ShapeConfig(d_model=32, layers=2, heads=4, kv_heads=2, d_ff=64)


@dataclass(frozen=True)
class Corpus:
    """Stage directories."""

    packed: Path
    tokenizer: Path
    tokens: Path
    model: Path
    """Folder of an ABF model with random weights."""
    base: Path
    """Folder of another, as a Hugging Face model."""


def decode_stage(
    corpus: Corpus, directory: Path, task: PromptTask, decoder: DecoderConfig, **counts: Any
) -> Path:
    """A finished decode directory; `counts` change what its manifest says."""
    directory.mkdir(parents=True, exist_ok=True)
    found = decode_task(
        task,
        decoder,
        shift=True,
        seed=0,
        model_dir=corpus.model,
        packed=corpus.packed,
        tokenizer=corpus.tokenizer / "tokenizer",
        out=directory,
    )
    manifest = {
        "stage": "decode", "stage_version": 1, "config": None, "inputs": {}, "files": {},
        "counts": found | counts, "started": 0.0, "seconds": 1.0,
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def texts() -> list[str]:
    """Functions and classes of a few modules."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for name in MODULES:
        source = (folder / f"{name}.py").read_text(encoding="utf-8")
        found += [part for part in source.split("\n\n\n") if len(part) > 80]
    return found


def build_corpus(
    root: Path,
    *,
    segmenter: ConfigModel,
    row_length: int = L,
    everything: Sequence[str] | None = None,
) -> Corpus:
    """Documents to packed rows below `root`: `texts()`, or those given."""
    torch.set_num_threads(1)
    everything = everything or texts()
    for split, part in (("train", everything[::2]), ("heldout", everything[1::2])):
        rows = [
            {
                "doc_id": f"{split}-{number}",
                "text": text,
                "source": "stdlib",
                "licence": "PSF-2.0",
                "language": "python",
            }
            for number, text in enumerate(part)
        ]
        path = root / "documents" / "documents" / f"{split}-00000.parquet"
        write_table(path, pa.Table.from_pylist(rows, schema=DOCUMENTS), DOCUMENTS)
    tokenizer, tokens, segments, packed = (
        root / name for name in ("tokenizer", "tokens", "segments", "packed")
    )
    make_tokenizer(TrainedTokenizer(vocab_size=320), root / "documents", tokenizer)
    tokenize(root / "documents", tokenizer, tokens)
    segment(segmenter, root / "documents", tokens, segments, None)  # pyright: ignore
    cfg = PackConfig(row_length=row_length, max_block=S)
    pack(cfg, tokens, segments, tokenizer, packed)
    for seed, folder in enumerate(("model", "base")):
        made = new_model(
            SHAPE, vocab_size=320, document_id=0, max_block=S, max_positions=256, seed=seed
        )
        with torch.no_grad():  # random weights this large have opinions
            for name, parameter in made.named_parameters():
                if parameter.dim() > 1 and not name.startswith("length_head"):
                    parameter.mul_(6)
            made.length_head.weight.normal_(generator=torch.Generator().manual_seed(seed))
        save_model(made, root / "model") if folder == "model" else save_hf(made, root / "base")
    return Corpus(packed, tokenizer, tokens, root / "model", root / "base")
