"""How much of the held-out text a task scored, source by source."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from abf.artifacts import PIECES, read_table


@dataclass(frozen=True)
class Share:
    """Documents of one source that were scored, of those held out."""

    source: str
    scored: int
    documents: int


def heldout_documents(pack: Path) -> list[str]:
    """Ids of the documents in the held-out split of a pack stage, each once.

    Raises:
        ArtifactError: the list of pieces is missing or damaged.
    """
    pieces = read_table(pack / "packed" / "heldout.pieces.parquet", PIECES)
    return list(dict.fromkeys(pieces["doc_id"].to_pylist()))


def coverage(scored: Iterable[str], heldout: Iterable[str]) -> list[Share]:
    """Scored and held-out documents by source, in order of the split.

    A document's id is the slug of its source, a hyphen, and a hash (`abf.data.prepare`).
    """
    scored = set(scored)
    members: dict[str, list[bool]] = {}
    for name in heldout:
        members.setdefault(name.rpartition("-")[0], []).append(name in scored)
    return [Share(source, sum(hits), len(hits)) for source, hits in members.items()]
