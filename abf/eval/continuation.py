"""Continued held-out text: how parallel, how fast, at what cost, and how good.

Quality is what the base AR model charges for the generated text given its prompt; since repetition
lowers that too, diversity stands beside it (notes/method.md, section D). Every figure is a ratio
with one part a prompt. Letters: R requests.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from abf.artifacts import SAMPLES, read_manifest, read_table
from abf.data.loader import PackedBatch
from abf.data.tokenizer import TextTokenizer, load_tokenizer
from abf.decode.replay import fold
from abf.decode.trace import read_trace
from abf.diffusion.loss import ar_charges, scatter
from abf.errors import ArtifactError
from abf.eval.base import Measure, Ratio, Single, Subject
from abf.eval.config import ContinuationTask
from abf.eval.flops import forward_flops, passes_from_log
from abf.model.transformer import Transformer
from abf.track.progress import Progress

BATCH_ROWS = 8
"""Generations judged side by side."""
BACKEND = "tiles"

ONE_CLOCK = "wall-clock of one decode; the interval is over documents, not over repeats"

Column = NDArray[np.float64]
"""[R] a number for every request."""


class Continuation:
    """See the module."""

    version = 2

    def __init__(self, cfg: ContinuationTask) -> None:
        self.cfg = cfg

    def measure(self, subject: Subject, decoded: Path | None) -> list[Measure]:
        """Figures of one decode."""
        assert decoded is not None, "a continuation is scored from its decode"
        samples = read_table(decoded / "samples.parquet", SAMPLES).to_pylist()
        events = verified_log(decoded, samples, load_tokenizer(subject.tokenizer))
        names = [sample["prompt_id"] for sample in samples]
        tokens = column(len(sample["token_ids"]) for sample in samples)
        ones = np.ones(len(samples))

        def ratio(
            metric: str, unit: str, numerator: Column, denominator: Column, note: str = ""
        ) -> Ratio:
            return Ratio(metric, unit, names, numerator, denominator, note)

        nfe, positions, finished, wall_s = (
            column(sample[name] for sample in samples)
            for name in ("nfe", "positions", "finished", "wall_s")
        )
        found: list[Measure] = [
            ratio("tokens_per_forward", "tokens/forward", tokens, nfe),
            ratio("nfe", "forwards/request", nfe, ones),
            ratio("positions_per_token", "rows/token", positions, tokens),
            ratio("tokens_per_second", "tokens/s", tokens, wall_s, ONE_CLOCK),
            joules_per_token(decoded, int(tokens.sum())),
        ]
        flops = logged_flops(decoded, events, samples, subject.model)
        found.append(ratio("forward_flops_per_token", "FLOP/token", flops, tokens))

        passes = 1 + subject.causal
        with (
            Progress(subject.label, len(samples) * passes, unit="texts") as progress,
            subject.inference(),
        ):
            nats = generated_nats(subject.base, samples, progress)
            n_bytes = column(text_bytes(sample["text"]) for sample in samples)
            bits = nats / math.log(2)
            found.append(ratio("base_bits_per_byte", "bits/byte", bits, n_bytes))
            if subject.causal:
                audit = -generated_nats(subject.model, samples, progress)
                found.append(ratio("ar_log_prob_per_token", "nats/token", audit, tokens))

        texts = [s["token_ids"][: len(s["token_ids"]) - s["finished"]] for s in samples]
        pairs, fours = (np.array([ngrams(ids, n) for ids in texts]).T for n in (2, 4))
        return [
            *found,
            ratio("distinct_2", "share", pairs[0], pairs[1]),
            ratio("repeated_4", "share", fours[1] - fours[0], fours[1]),
            ratio("unigram_entropy", "bits", column(map(unigram_entropy, texts)), ones),
            ratio("generated_tokens", "tokens/request", tokens, ones),
            ratio("finished_share", "share", finished, ones),
        ]


def column(values: Any) -> Column:
    """Numbers, one a request, as [R]."""
    return np.fromiter(values, dtype=np.float64)


def joules_per_token(decoded: Path, tokens: int) -> Single:
    """Energy of the whole decode over its tokens; it has no parts by prompt."""
    counts = read_manifest(decoded, "decode")["counts"]
    source, joules = counts["energy_source"], counts.get("joules")
    value = None if joules is None else joules / tokens
    return Single("joules_per_token", "J/token", value, tokens, source)


def verified_log(
    decoded: Path, samples: Sequence[dict[str, Any]], tokenizer: TextTokenizer
) -> pa.Table:
    """Events of a decode, once their replay has given the samples' very tokens and text.

    Raises:
        ArtifactError: the log is cut or altered, or tells of another text; names the request.
    """
    path = decoded / "trace.arrows"
    header, events, complete = read_trace(path)
    if not complete:
        raise ArtifactError(f"{path} is incomplete: its tail was cut; rerun the decode")
    folded = fold(events, mask_id=int(header["mask_id"]), where=str(path))
    for sample in samples:
        state = folded.get(sample["request"])
        ids = [] if state is None else state.token_ids
        text = tokenizer.decode(ids[: len(ids) - sample["finished"]])
        if ids != sample["token_ids"] or text != sample["text"]:
            raise ArtifactError(
                f"{path}: request {sample['request']} gives another text than samples.parquet; "
                "rerun the decode"
            )
    return events


def logged_flops(
    decoded: Path, events: pa.Table, samples: Sequence[dict[str, Any]], model: Transformer
) -> Column:
    """Modelled forward FLOPs of each request.

    Raises:
        ArtifactError: the log tells of other forward passes than the samples; names the request.
    """
    passes = passes_from_log(events)
    for sample in samples:
        logged = passes.get(sample["request"])
        told = (sample["nfe"], sample["positions"])
        if logged is None or (logged.nfe, logged.positions) != told:
            raise ArtifactError(
                f"{decoded}: request {sample['request']} logged {logged}, but samples.parquet says "
                f"nfe={told[0]}, positions={told[1]}; rerun the decode"
            )
    return column(forward_flops(model, passes[sample["request"]]) for sample in samples)


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
