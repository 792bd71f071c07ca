"""Documents to token ids with offsets, shard by shard, in the order of the documents."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from abf.artifacts import DOCUMENTS, TOKENS, read_table, shards, write_table
from abf.data.prepare import SPLITS
from abf.data.tokenizer import Encoded, TextTokenizer, load_tokenizer
from abf.track.progress import Progress

BATCH_DOCUMENTS = 256
"""Documents encoded at once: enough to keep the tokenizer's threads busy."""


def tokenize(documents: Path, tokenizer: Path, out: Path) -> dict[str, int | float | str]:
    """Write `out`/tokens/{split}-*.parquet (TOKENS), one file for each file of documents.

    Args:
        documents: stage directory of `prepare`.
        tokenizer: stage directory of `tokenizer`.

    Returns:
        Documents, tokens, bytes and bytes a token, split by split.
    """
    encoder = load_tokenizer(tokenizer / "tokenizer")
    files = {split: shards(documents / "documents", split) for split in SPLITS}
    total = sum(pq.read_metadata(path).num_rows for paths in files.values() for path in paths)
    counts: dict[str, int | float | str] = {}
    with Progress("tokenize", total, unit="documents") as progress:
        for split, paths in files.items():
            n_documents = n_tokens = n_bytes = 0
            for path in paths:
                table = _encode_shard(read_table(path, DOCUMENTS), encoder, progress)
                write_table(out / "tokens" / path.name, table, TOKENS)
                n_documents += len(table)
                n_tokens += sum(len(c.flatten()) for c in table.column("token_ids").chunks)
                n_bytes += int(table.column("n_bytes").to_numpy().sum())
            counts[f"{split}_documents"] = n_documents
            counts[f"{split}_tokens"] = n_tokens
            counts[f"{split}_bytes"] = n_bytes
            counts[f"{split}_bytes_per_token"] = round(n_bytes / max(n_tokens, 1), 4)
    return counts


def _encode_shard(documents: pa.Table, encoder: TextTokenizer, progress: Progress) -> pa.Table:
    texts: list[str] = documents.column("text").to_pylist()
    encoded: list[Encoded] = []
    for first in range(0, len(texts), BATCH_DOCUMENTS):
        batch = texts[first : first + BATCH_DOCUMENTS]
        encoded += encoder.spans(batch)
        progress.update(len(batch))
    return pa.table(
        {
            "doc_id": documents.column("doc_id"),
            "token_ids": _lists([one.ids for one in encoded]),
            "char_start": _lists([one.char_start for one in encoded]),
            "byte_start": _lists([one.byte_start for one in encoded]),
            "n_bytes": np.array([one.n_bytes for one in encoded], dtype=np.int64),
        }
    )


def _lists(arrays: list[npt.NDArray[np.uint32]]) -> pa.ListArray:
    offsets = np.cumsum([0, *map(len, arrays)])
    assert offsets[-1] < 2**31, "lower prepare.shard_documents: a list column holds 2^31 values"
    values = np.concatenate(arrays) if arrays else np.empty(0, np.uint32)
    return pa.ListArray.from_arrays(offsets.astype(np.int32), values)
