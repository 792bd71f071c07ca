"""Continued held-out text: what it cost, and how good it is.

Quality is what the base AR model charges for the generated text given its prompt; since repetition
lowers that too, diversity stands beside it (notes/method.md, section D). Every figure is a ratio
with one part a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from abf.data.loader import PackedBatch
from abf.diffusion.loss import ar_charges, scatter
from abf.eval.base import Measure, Subject
from abf.eval.config import ContinuationTask
from abf.eval.costs import Column, column, read_decode
from abf.model.transformer import Transformer
from abf.track.progress import Progress

BATCH_ROWS = 8
"""Generations judged side by side."""
BACKEND = "tiles"


class Continuation:
    """See the module."""

    version = 2

    def __init__(self, cfg: ContinuationTask) -> None:
        self.cfg = cfg

    def measure(self, subject: Subject, decoded: Path | None) -> list[Measure]:
        """Figures of one decode."""
        assert decoded is not None, "a continuation is scored from its decode"
        found = read_decode(decoded, subject)
        samples, ratio = found.samples, found.ratio
        measures = [*found.costs]
        passes = 1 + subject.causal
        with (
            Progress(subject.label, len(samples) * passes, unit="texts") as progress,
            subject.inference(),
        ):
            nats = generated_nats(subject.base, samples, progress)
            n_bytes = column(text_bytes(sample["text"]) for sample in samples)
            measures.append(ratio("base_bits_per_byte", "bits/byte", nats / math.log(2), n_bytes))
            if subject.causal:
                audit = -generated_nats(subject.model, samples, progress)
                measures.append(ratio("ar_log_prob_per_token", "nats/token", audit, found.tokens))

        texts = [s["token_ids"][: len(s["token_ids"]) - s["finished"]] for s in samples]
        pairs, fours = (np.array([ngrams(ids, n) for ids in texts]).T for n in (2, 4))
        return [
            *measures,
            ratio("distinct_2", "share", pairs[0], pairs[1]),
            ratio("repeated_4", "share", fours[1] - fours[0], fours[1]),
            ratio("unigram_entropy", "bits", column(map(unigram_entropy, texts))),
        ]


def generated_nats(
    model: Transformer, samples: Sequence[dict[str, Any]], progress: Progress
) -> Column:
    """AR NLL of each request's new tokens given document token and prompt."""
    document_token = model.config.document_id
    found = []
    for start in range(0, len(samples), BATCH_ROWS):
        part = samples[start : start + BATCH_ROWS]
        rows = [[document_token, *s["prompt_ids"], *s["token_ids"]] for s in part]
        shape = (len(rows), max(map(len, rows)))
        token_ids = np.full(shape, document_token, dtype=np.int64)
        document_id = np.full(shape, -1, dtype=np.int64)
        for row, ids in enumerate(rows):
            token_ids[row, : len(ids)] = ids
            document_id[row, : len(ids)] = 0
        batch = PackedBatch(token_ids, document_id, document_id, np.arange(len(rows)))
        nats = scatter(ar_charges(model, batch, backend=BACKEND), batch)
        found += [nats[i, 1 + len(s["prompt_ids"]) :].sum() for i, s in enumerate(part)]
        progress.update(len(part))
    return column(found)


def text_bytes(text: str) -> int:
    """UTF-8 bytes of a generated text; broken UTF-8 (U+FFFD, 3 bytes) counts as the one byte it
    stands for at least, so that breaking characters does not make a text look cheaper."""
    return len(text.encode("utf-8")) - 2 * text.count("\ufffd")


def ngrams(ids: Sequence[int], n: int) -> tuple[int, int]:
    """Distinct and all n-grams of a text."""
    found = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return len(set(found)), len(found)


def unigram_entropy(ids: Sequence[int]) -> float:
    """Entropy in bits of a text's own token frequencies."""
    if not ids:
        return 0.0
    share = np.unique(np.asarray(ids), return_counts=True)[1] / len(ids)
    return float(-(share * np.log2(share)).sum()) + 0.0


def build(cfg: ContinuationTask) -> Continuation:
    """The task of its config."""
    return Continuation(cfg)
