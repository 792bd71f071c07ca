"""Cleaning, exact deduplication across sources, and the split by a hash of the text.

Cleaning turns every line end into a newline and drops NUL characters; nothing else is touched. The
hash of the cleaned text decides on duplicates, gives the document its id and picks its split, so
that adding or reordering sources moves no document from one split to the other.
"""

from __future__ import annotations

import hashlib
import re
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from abf.artifacts import DOCUMENTS, check_schema, write_table
from abf.data.config import PrepareConfig
from abf.errors import ArtifactError, DataError
from abf.track.progress import Progress

SPLITS = ("train", "heldout")
HASH_BYTES = 10
"""Bytes of the text's hash: two different texts among 10^9 share it with a chance of 4e-7."""


def prepare(cfg: PrepareConfig, raw: Sequence[Path], out: Path) -> dict[str, int | float | str]:
    """Write `out`/documents/{train,heldout}-*.parquet from fetched sources, in their order.

    Args:
        raw: stage directories of `fetch`; of two equal texts the first one is kept.

    Raises:
        DataError: one of the splits ends empty; says what was dropped and what to change.
        ArtifactError: a raw file that is truncated or has another schema.
    """
    files = [path for directory in raw for path in _raw_files(directory)]
    total = sum(pq.read_metadata(path).num_rows for path in files)
    counts: Counter[str] = Counter()
    shards = {split: _Shards(out / "documents", split, cfg.shard_documents) for split in SPLITS}
    seen: set[bytes] = set()
    with Progress("prepare", total, unit="documents") as progress:
        for table in _load(files, out):
            for row in table.to_pylist():
                text = clean(row["text"], cfg, counts)
                if text is None:
                    continue
                digest = text_hash(text)
                if digest in seen:
                    counts["n_duplicates"] += 1
                    continue
                seen.add(digest)
                split = "heldout" if is_heldout(digest, cfg.heldout_fraction) else "train"
                shards[split].add(document_id(row["source"], digest), text, row)
            progress.update(len(table))
    for split in SPLITS:
        if not shards[split].documents:
            raise DataError(_empty(split, total, len(seen), counts, cfg))
        shards[split].flush()
    names = ("n_duplicates", "n_short", "n_cut", "n_other_newlines", "n_nul_characters")
    return {
        "n_read": total,
        **{name: counts[name] for name in names},
        **{f"{s}_documents": shards[s].documents for s in SPLITS},
        **{f"{s}_bytes": shards[s].n_bytes for s in SPLITS},
    }


def clean(text: str, cfg: PrepareConfig, counts: Counter[str]) -> str | None:
    """The text as it enters the corpus, or None when it is too short; `counts` says what was done.

    A long text is cut before the last newline or space that leaves at most `max_chars` and at least
    `min_chars` characters, or hard at `max_chars` where there is none.
    """
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        counts["n_other_newlines"] += 1
    if "\0" in text:
        counts["n_nul_characters"] += text.count("\0")
        text = text.replace("\0", "")
    if cfg.max_chars is not None and len(text) > cfg.max_chars:
        bounds = (cfg.min_chars, cfg.max_chars + 1)
        cut = max(text.rfind("\n", *bounds), text.rfind(" ", *bounds))
        text = text[: cut if cut >= 0 else cfg.max_chars]
        counts["n_cut"] += 1
    if len(text.strip()) < cfg.min_chars:
        counts["n_short"] += 1
        return None
    return text


def text_hash(text: str) -> bytes:
    """Hash of a document's text: its identity."""
    return hashlib.blake2b(text.encode("utf-8"), digest_size=HASH_BYTES).digest()


def is_heldout(digest: bytes, fraction: float) -> bool:
    """Whether a document is held out: its hash, read as a number in [0, 1), is below `fraction`."""
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def document_id(source: str, digest: bytes) -> str:
    """Readable and unique: the source's slug and the text's hash."""
    slug = re.sub(r"[^a-z0-9]+", "-", source.lower()).strip("-")
    return f"{slug}-{digest.hex()}"


@dataclass
class _Shards:
    """Documents of one split on their way to Parquet files."""

    folder: Path
    split: str
    size: int
    documents: int = 0
    n_bytes: int = 0
    _rows: list[dict[str, str]] = field(default_factory=list)
    _written: int = 0

    def add(self, doc_id: str, text: str, row: dict[str, str]) -> None:
        self._rows.append({**row, "doc_id": doc_id, "text": text})
        self.documents += 1
        self.n_bytes += len(text.encode("utf-8"))
        if len(self._rows) == self.size:
            self.flush()

    def flush(self) -> None:
        if self._rows:
            path = self.folder / f"{self.split}-{self._written:05d}.parquet"
            write_table(path, pa.Table.from_pylist(self._rows, schema=DOCUMENTS), DOCUMENTS)
            self._written += 1
            self._rows = []


def _raw_files(directory: Path) -> list[Path]:
    files = sorted((directory / "raw").glob("*.parquet"))
    if not files:
        raise ArtifactError(f"{directory / 'raw'} holds no Parquet file; rerun fetch")
    for path in files:
        try:
            schema = pq.read_schema(path)
        except (pa.ArrowInvalid, OSError) as error:
            raise ArtifactError(
                f"{path} cannot be read ({str(error).splitlines()[0]}); delete its stage directory "
                "and run the same command again"
            ) from error
        check_schema(schema, DOCUMENTS, path)
    return files


def _load(files: Sequence[Path], out: Path) -> Iterator[pa.Table]:
    """Batches of rows through `datasets`, streamed: its cache stays empty, and inside `out`."""
    from datasets import config, load_dataset

    # Reading local files, too, it reports to a server in the internet, in silence, which costs a
    # node without a network the seconds until name service gives up.
    config.HF_UPDATE_DOWNLOAD_COUNTS = False
    with tempfile.TemporaryDirectory(dir=out, prefix=".datasets-") as cache:
        data = load_dataset(
            "parquet",
            data_files=[_literal(path) for path in files],
            split="train",
            streaming=True,
            cache_dir=cache,
        )
        yield from data.with_format("arrow").iter(batch_size=1000)


def _literal(path: Path) -> str:
    """The path as a pattern that matches only itself."""
    return re.sub(r"([*?[])", r"[\1]", str(path.resolve()))


def _empty(split: str, read: int, kept: int, counts: Counter[str], cfg: PrepareConfig) -> str:
    dropped = (
        f"{read} documents were read, {counts['n_short']} were shorter than min_chars = "
        f"{cfg.min_chars} and {counts['n_duplicates']} duplicates, so {kept} remain"
    )
    if not kept:
        return f"no document is left: {dropped}; lower prepare.min_chars or add text"
    move = "raise" if split == "heldout" else "lower"
    return (
        f"the {split} split is empty: {dropped}, split with heldout_fraction = "
        f"{cfg.heldout_fraction}; add text or {move} prepare.heldout_fraction"
    )
