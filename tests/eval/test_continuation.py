"""Scores of generated text: counts, cost, quality against `transformers`, diversity by hand."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from abf.artifacts import SAMPLES, read_table, write_table
from abf.decode.batch import MixedAttend
from abf.decode.config import DecoderConfig, LengthHeadExtent, SamplerConfig, ThresholdStrategy
from abf.decode.trace import read_trace
from abf.errors import ArtifactError
from abf.eval.base import Measure, Ratio, Single
from abf.eval.config import ContinuationTask
from abf.eval.continuation import Continuation, ngrams, text_bytes, unigram_entropy
from abf.eval.flops import active_parameters, passes_from_log
from abf.model.store import load_model
from abf.model.transformer import Transformer
from tests.eval.corpus import Corpus, decode_stage
from tests.eval.test_likelihood import subject, value

TASK = ContinuationTask(prompts=5, prompt_tokens=12, new_tokens=20)
DECODER = DecoderConfig(
    strategy=ThresholdStrategy(threshold=0.4),
    extent=LengthHeadExtent(),
    sampler=SamplerConfig(temperature=0.7),
    precision="fp32",
    batch_size=3,
)


def made(corpus: Corpus, directory: Path, **counts: Any) -> Path:
    return decode_stage(corpus, directory, TASK, DECODER, **counts)


@pytest.fixture(scope="module")
def decoded(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    none = {"energy_source": "not measured: no RAPL package counter below /sys"}
    return made(corpus, tmp_path_factory.mktemp("decode"), **none)


@pytest.fixture(scope="module")
def figures(corpus: Corpus, decoded: Path) -> dict[str, Measure]:
    found = Continuation(TASK).measure(subject(corpus), decoded)
    return {measure.metric: measure for measure in found}


def samples(decoded: Path) -> list[dict[str, Any]]:
    return read_table(decoded / "samples.parquet", SAMPLES).to_pylist()


def test_counts(decoded: Path, figures: dict[str, Measure]) -> None:
    rows = samples(decoded)
    tokens, nfe = sum(len(s["token_ids"]) for s in rows), sum(s["nfe"] for s in rows)
    assert value(figures["tokens_per_forward"]) == tokens / nfe
    assert value(figures["nfe"]) == nfe / 5
    assert value(figures["positions_per_token"]) == sum(s["positions"] for s in rows) / tokens
    assert value(figures["generated_tokens"]) == tokens / 5
    assert value(figures["finished_share"]) == sum(s["finished"] for s in rows) / 5
    speed = tokens / sum(s["wall_s"] for s in rows)
    assert value(figures["tokens_per_second"]) == pytest.approx(speed)


def test_quality_is_the_judgement_of_transformers(
    corpus: Corpus, decoded: Path, figures: dict[str, Measure]
) -> None:
    from transformers import AutoModelForCausalLM

    judge = AutoModelForCausalLM.from_pretrained(corpus.base, dtype=torch.float32).eval()
    bits, n_bytes = 0.0, 0
    for sample in samples(decoded):
        text = torch.tensor([[0, *sample["prompt_ids"], *sample["token_ids"]]])
        with torch.no_grad():
            log_probs = judge(text).logits[0, :-1].log_softmax(-1)
        new = log_probs.gather(1, text[0, 1:, None])[len(sample["prompt_ids"]) :]
        assert len(new) == len(sample["token_ids"])
        bits -= float(new.sum()) / math.log(2)
        n_bytes += text_bytes(sample["text"])
    assert value(figures["base_bits_per_byte"]) == pytest.approx(bits / n_bytes, rel=1e-5)


def test_audit_is_what_the_log_says(decoded: Path, figures: dict[str, Measure]) -> None:
    _, events, _ = read_trace(decoded / "trace.arrows")
    probs = [e["prob"] for e in events.to_pylist() if e["type"] == "KV_WRITE"]
    assert value(figures["ar_log_prob_per_token"]) == pytest.approx(
        np.mean(np.log(probs)), abs=1e-3
    )


def test_passes_rebuilt_from_the_log_are_those_that_ran(
    corpus: Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counter: the keys that the rows of each pass really attended to."""
    pairs: list[int] = []
    real: Callable[..., Any] = MixedAttend._requests

    def counting(self: MixedAttend, rows: int, read: torch.Tensor | None) -> Any:
        asked = real(self, rows, read)
        if read is None:
            new = (asked.queries[:, 1] - asked.queries[:, 0]).long()
            pairs.append(int(asked.seen.sum() + (new * asked.lengths).sum()))
        return asked

    monkeypatch.setattr(MixedAttend, "_requests", counting)
    made(corpus, tmp_path)
    _, events, _ = read_trace(tmp_path / "trace.arrows")
    passes = passes_from_log(events)
    assert sum(p.pairs for p in passes.values()) == sum(pairs)
    for sample in samples(tmp_path):
        found = passes[sample["request"]]
        assert (found.nfe, found.positions) == (sample["nfe"], sample["positions"])


def test_flops(corpus: Corpus, decoded: Path, figures: dict[str, Measure]) -> None:
    model: Transformer = load_model(corpus.model)
    config = model.config
    per_layer = 2 * 32 * (4 + 2) * 8 + 3 * 32 * 64
    assert active_parameters(model) == 2 * per_layer + 320 * 32
    _, events, _ = read_trace(decoded / "trace.arrows")
    passes = passes_from_log(events).values()
    total = 2 * active_parameters(model) * sum(p.positions for p in passes)
    total += 4 * config.layers * 32 * sum(p.pairs for p in passes)
    tokens = sum(len(s["token_ids"]) for s in samples(decoded))
    assert value(figures["forward_flops_per_token"]) == pytest.approx(total / tokens)


def test_joules(corpus: Corpus, tmp_path: Path, figures: dict[str, Measure]) -> None:
    none = figures["joules_per_token"]
    assert isinstance(none, Single)
    assert none.value is None
    assert none.note == "not measured: no RAPL package counter below /sys"
    measured = made(corpus, tmp_path, joules=50.0, energy_source="rapl:package")
    found = {m.metric: m for m in Continuation(TASK).measure(subject(corpus), measured)}
    tokens = sum(len(s["token_ids"]) for s in samples(measured))
    assert value(found["joules_per_token"]) == pytest.approx(50 / tokens)
    assert found["joules_per_token"].note == "rapl:package"


def test_diversity_by_hand(figures: dict[str, Measure]) -> None:
    assert ngrams([1, 2, 1, 2, 1], 2) == (2, 4)
    assert ngrams([1, 2, 1, 2, 1, 2], 4) == (2, 3)
    assert ngrams([1, 2, 3], 4) == (0, 0)
    assert unigram_entropy([1, 1, 2, 2]) == 1.0
    assert unigram_entropy([7, 7, 7]) == 0.0
    assert unigram_entropy([]) == 0.0
    assert text_bytes("aä€") == 6
    assert text_bytes("a\ufffd") == 2
    assert 0 < value(figures["distinct_2"]) <= 1
    assert 0 <= value(figures["repeated_4"]) < 1


def test_every_part_belongs_to_a_prompt(decoded: Path, figures: dict[str, Measure]) -> None:
    names = [s["prompt_id"] for s in samples(decoded)]
    for measure in figures.values():
        if isinstance(measure, Ratio):
            assert measure.documents == names
            assert len(measure.numerator) == len(measure.denominator) == len(names)


def test_samples_that_are_not_the_logs_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    directory = made(corpus, tmp_path)
    rows = samples(directory)
    for change in ({"token_ids": [5, 6]}, {"text": "something else"}, {"nfe": 1}):
        changed = [rows[0], rows[1] | change, *rows[2:]]
        table = pa.Table.from_pylist(changed, schema=SAMPLES)
        write_table(directory / "samples.parquet", table, SAMPLES)
        with pytest.raises(ArtifactError, match="request 1"):
            Continuation(TASK).measure(subject(corpus), directory)


def test_a_cut_log_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    directory = made(corpus, tmp_path)
    log = directory / "trace.arrows"
    log.write_bytes(log.read_bytes()[: log.stat().st_size // 2])
    with pytest.raises(ArtifactError, match=r"trace\.arrows is incomplete"):
        Continuation(TASK).measure(subject(corpus), directory)
