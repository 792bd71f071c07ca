"""What every decode is asked for: what its text cost, once its log agrees with its samples.

Every figure is a ratio with one part a prompt. Letters: R requests.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from abf.artifacts import SAMPLES, read_manifest, read_table
from abf.data.tokenizer import TextTokenizer, load_tokenizer
from abf.decode.replay import fold
from abf.decode.trace import read_trace
from abf.errors import ArtifactError
from abf.eval.base import Measure, Ratio, Single, Subject
from abf.eval.flops import forward_flops, passes_from_log
from abf.model.transformer import Transformer

ONE_CLOCK = "wall-clock of one decode; the interval is over documents, not over repeats"

Column = NDArray[np.float64]
"""[R] a number for every request."""


@dataclass(frozen=True)
class Decoded:
    """Samples of a decode."""

    samples: Sequence[dict[str, Any]]
    """Rows of the SAMPLES schema."""
    costs: Sequence[Measure]
    """What they cost."""

    @property
    def tokens(self) -> Column:
        """New tokens."""
        return column(len(sample["token_ids"]) for sample in self.samples)

    def ratio(
        self, metric: str, unit: str, numerator: Column, denominator: Column | None = None
    ) -> Ratio:
        """A figure with one part a prompt; a mean over prompts when nothing is divided by."""
        names = [sample["prompt_id"] for sample in self.samples]
        below = np.ones(len(names)) if denominator is None else denominator
        return Ratio(metric, unit, names, numerator, below)


def read_decode(decoded: Path, subject: Subject) -> Decoded:
    """Samples of a decode and what they cost.

    Raises:
        ArtifactError: the log is cut or altered, or tells of other text or other forward passes
            than the samples; names the request.
    """
    samples = read_table(decoded / "samples.parquet", SAMPLES).to_pylist()
    events = verified_log(decoded, samples, load_tokenizer(subject.tokenizer))
    found = Decoded(samples, ())
    nfe, positions, finished, wall_s = (
        column(sample[name] for sample in samples)
        for name in ("nfe", "positions", "finished", "wall_s")
    )
    flops = logged_flops(decoded, events, samples, subject.model)
    tokens = found.tokens
    speed = found.ratio("tokens_per_second", "tokens/s", tokens, wall_s)
    costs = [
        found.ratio("tokens_per_forward", "tokens/forward", tokens, nfe),
        found.ratio("nfe", "forwards/request", nfe),
        found.ratio("positions_per_token", "rows/token", positions, tokens),
        replace(speed, note=ONE_CLOCK),
        joules_per_token(decoded, int(tokens.sum())),
        found.ratio("forward_flops_per_token", "FLOP/token", flops, tokens),
        found.ratio("generated_tokens", "tokens/request", tokens),
        found.ratio("finished_share", "share", finished),
    ]
    return replace(found, costs=costs)


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
    folded = fold(events, header, where=str(path))
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
    passes = passes_from_log(events, ends=model.config.edit_heads)
    for sample in samples:
        logged = passes.get(sample["request"])
        told = (sample["nfe"], sample["positions"])
        if logged is None or (logged.nfe, logged.positions) != told:
            raise ArtifactError(
                f"{decoded}: request {sample['request']} logged {logged}, but samples.parquet says "
                f"nfe={told[0]}, positions={told[1]}; rerun the decode"
            )
    return column(forward_flops(model, passes[sample["request"]]) for sample in samples)
