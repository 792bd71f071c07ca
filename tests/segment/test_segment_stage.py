"""The stage around the segmenters, and what every segmenter must keep to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from abf.artifacts import DOCUMENTS, SEGMENTS, check_schema, write_table
from abf.errors import ArtifactError
from abf.segment.base import segment
from abf.segment.config import (
    FixedSegmenter,
    LineSegmenter,
    RandomSegmenter,
    Segmenter,
    SentenceSegmenter,
)

SENTENCE = SentenceSegmenter(min_tokens=3)
KINDS: list[Segmenter] = [
    SENTENCE,
    LineSegmenter(),
    FixedSegmenter(length=7),
    FixedSegmenter(like=SENTENCE),
    RandomSegmenter(like=SENTENCE, seed=2),
]


@pytest.fixture(scope="module")
def reference(stages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("sentence")
    segment(SENTENCE, stages / "prepare", stages / "tokenize", out, None)
    return out


def read(stage: Path, kind: str, split: str) -> list[dict[str, Any]]:
    return [
        r for p in sorted((stage / kind).glob(f"{split}-*")) for r in pq.read_table(p).to_pylist()
    ]


@pytest.mark.parametrize("cfg", KINDS, ids=lambda cfg: cfg.kind)
def test_every_segmenter_covers_every_document(
    cfg: Segmenter, stages: Path, reference: Path, tmp_path: Path
) -> None:
    given = reference if getattr(cfg, "like", None) else None
    counts = segment(cfg, stages / "prepare", stages / "tokenize", tmp_path, given, 64)
    files = sorted(path.name for path in (tmp_path / "segments").iterdir())
    assert files == ["heldout-00000.parquet", "train-00000.parquet", "train-00001.parquet"]
    for split in ("train", "heldout"):
        tokens = read(stages / "tokenize", "tokens", split)
        rows = read(tmp_path, "segments", split)
        assert [row["doc_id"] for row in rows] == [row["doc_id"] for row in tokens]
        n_segments = n_slots = 0
        for row, source in zip(rows, tokens, strict=True):
            starts, n = row["segment_start"], len(source["token_ids"]) + 1
            assert starts[0] == 0
            assert (np.diff(starts) > 0).all()
            assert starts[-1] < n
            assert len(starts) == len(row["boundary_score"]) == len(row["level"])
            assert set(row["boundary_score"]) == {1.0}
            n_segments, n_slots = n_segments + len(starts), n_slots + n
        assert counts[f"{split}_n_segments"] == n_segments
        assert counts[f"{split}_n_tokens"] == n_slots - len(rows)
        assert counts[f"{split}_mean_length"] == round(n_slots / n_segments, 4)
    check_schema(pq.read_schema(tmp_path / "segments" / files[0]), SEGMENTS, tmp_path)
    again = tmp_path / "again"
    segment(cfg, stages / "prepare", stages / "tokenize", again, given, 64)
    for name in files:
        one, two = tmp_path / "segments" / name, again / "segments" / name
        assert one.read_bytes() == two.read_bytes()


def test_random_keeps_the_histogram_and_moves_the_cuts(
    stages: Path, reference: Path, tmp_path: Path
) -> None:
    cfg = RandomSegmenter(like=SENTENCE)
    counts = segment(cfg, stages / "prepare", stages / "tokenize", tmp_path, reference)
    shared = cuts = moved = 0
    lengths: dict[str, list[int]] = {"before": [], "after": []}
    for name in ("train-00000", "train-00001"):
        tokens = pq.read_table(stages / f"tokenize/tokens/{name}.parquet").to_pylist()
        before, after = (
            pq.read_table(stage / f"segments/{name}.parquet").to_pylist()
            for stage in (reference, tmp_path)
        )
        for one, two, source in zip(before, after, tokens, strict=True):
            n = len(source["token_ids"]) + 1
            old, new = one["segment_start"], two["segment_start"]
            lengths["before"] += np.diff(old, append=n).tolist()
            lengths["after"] += np.diff(new, append=n).tolist()
            moved += old != new
            cuts += len(new) - 1
            shared += len(set(old[1:]) & set(new[1:]))
    assert sorted(lengths["before"]) == sorted(lengths["after"])
    assert moved > len(before) / 2
    assert counts["train_shared_cuts"] == round(shared / cuts, 4)


@pytest.mark.parametrize("cap", [8, 16, 500])
def test_fixed_has_the_mean_block_length_of_its_reference(
    stages: Path, reference: Path, tmp_path: Path, cap: int
) -> None:
    """Blocks, not segments: the cap cuts the reference's longest segments."""
    cfg = FixedSegmenter(like=SENTENCE)
    counts = segment(cfg, stages / "prepare", stages / "tokenize", tmp_path, reference, cap)
    tokens = read(stages / "tokenize", "tokens", "train")
    slots = np.array([len(row["token_ids"]) + 1 for row in tokens])
    rows = read(reference, "segments", "train")
    blocks = 0
    for row, n in zip(rows, slots, strict=True):
        blocks += sum(math.ceil(length / cap) for length in np.diff(row["segment_start"], append=n))
    mean = slots.sum() / blocks
    lengths = range(1, min(cap, 100) + 1)
    means = [slots.sum() / np.ceil(slots / length).sum() for length in lengths]
    nearest = min(means, key=lambda one: abs(one - mean))
    assert counts["train_mean_length"] == pytest.approx(nearest, abs=1e-4)


def test_inputs_of_different_documents(stages: Path, reference: Path, tmp_path: Path) -> None:
    path = tmp_path / "prepare/documents/train-00000.parquet"
    for name in ("train-00000", "train-00001", "heldout-00000"):
        table = pq.read_table(stages / f"prepare/documents/{name}.parquet")
        write_table(tmp_path / f"prepare/documents/{name}.parquet", table, DOCUMENTS)
    table = pq.read_table(path)
    write_table(path, table.take(pa.array([1, 0, *range(2, len(table))])), DOCUMENTS)
    with pytest.raises(ArtifactError, match=r"train-00000\.parquet \(8 documents\).*different"):
        segment(SENTENCE, tmp_path / "prepare", stages / "tokenize", tmp_path / "out", None)
    other = tmp_path / "other/segments/train-00000.parquet"
    table = pq.read_table(reference / "segments/train-00000.parquet")
    write_table(other, table.slice(0, 3), SEGMENTS)
    cfg = RandomSegmenter(like=SENTENCE)
    with pytest.raises(ArtifactError, match=r"other/segments/train-00000\.parquet \(3 documents\)"):
        segment(cfg, stages / "prepare", stages / "tokenize", tmp_path / "x", tmp_path / "other")
