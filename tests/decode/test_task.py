"""The decode stage on real text: prompts, samples, log, counts."""

from __future__ import annotations

from pathlib import Path

import pytest

from abf.artifacts import PIECES, SAMPLES, TOKENS, read_table
from abf.data.tokenizer import load_tokenizer
from abf.decode.config import (
    ArStrategy,
    DecoderConfig,
    FixedExtent,
    LengthHeadExtent,
    SamplerConfig,
    ThresholdStrategy,
)
from abf.decode.replay import replay
from abf.decode.task import decode_task
from abf.decode.trace import read_trace
from abf.errors import ArtifactError, ConfigError
from abf.eval.config import ContinuationTask
from abf.files import sha256
from abf.segment.config import FixedSegmenter
from tests.eval.corpus import Corpus, build_corpus

TASK = ContinuationTask(prompts=4, prompt_tokens=20, new_tokens=24)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    return build_corpus(tmp_path_factory.mktemp("corpus"), segmenter=FixedSegmenter(length=5))


def decoded(
    corpus: Corpus, out: Path, decoder: DecoderConfig, task: ContinuationTask = TASK
) -> dict[str, int | float | str]:
    return decode_task(
        task,
        decoder,
        shift=True,
        seed=3,
        model_dir=corpus.model,
        packed=corpus.packed,
        tokenizer=corpus.tokenizer / "tokenizer",
        out=out,
    )


@pytest.mark.parametrize(
    "decoder",
    [
        DecoderConfig(strategy=ArStrategy(), precision="fp32"),
        DecoderConfig(
            strategy=ThresholdStrategy(threshold=0.4),
            extent=LengthHeadExtent(),
            sampler=SamplerConfig(temperature=1.0),
            precision="fp32",
            batch_size=3,
        ),
    ],
    ids=["ar", "threshold"],
)
def test_log_samples_and_counts_agree(
    corpus: Corpus, tmp_path: Path, decoder: DecoderConfig
) -> None:
    counts = decoded(corpus, tmp_path, decoder)
    samples = read_table(tmp_path / "samples.parquet", SAMPLES).to_pylist()
    tokenizer = load_tokenizer(corpus.tokenizer / "tokenizer")
    found = replay(tmp_path / "trace.arrows")
    assert len(samples) == len(found) == counts["requests"] == 4
    for sample in samples:
        ids = found[sample["request"]]
        assert ids == sample["token_ids"]
        text = ids[:-1] if sample["finished"] else ids
        assert tokenizer.decode(text) == sample["text"]
        assert tokenizer.decode(sample["prompt_ids"]) == sample["prompt"]
        assert sum(sample["block_length"]) == len(ids)
    assert counts["tokens"] == sum(len(s["token_ids"]) for s in samples)
    assert counts["nfe"] == sum(s["nfe"] for s in samples)
    assert counts["positions"] == sum(s["positions"] for s in samples)
    assert counts["tpf"] == pytest.approx(float(counts["tokens"]) / float(counts["nfe"]))
    assert 0 < sum(s["wall_s"] for s in samples) <= float(counts["wall_s"])
    assert isinstance(counts["energy_source"], str)
    assert ("joules" in counts) == (not counts["energy_source"].startswith("not measured"))


@pytest.mark.parametrize(("steps", "told"), [(2, "  forced_blocks 1\n"), (16, "")])
def test_the_progress_line_tells_of_blocks_that_did_not_end_by_themselves(
    corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str], steps: int, told: str
) -> None:
    """One token is sure a step, so blocks of 16 that may take two steps are all cut short."""
    decoder = DecoderConfig(
        strategy=ThresholdStrategy(threshold=1),
        extent=FixedExtent(length=16),
        precision="fp32",
        max_steps_per_block=steps,
    )
    task = TASK.model_copy(update={"new_tokens": 16})
    counts = decoded(corpus, tmp_path, decoder, task)
    assert counts["forced_share"] == bool(told)
    last = capsys.readouterr().err.splitlines(keepends=True)[-1]
    assert "4/4 prompt (100 %)" in last
    assert last.partition("tokens_per_forward ")[2].lstrip("0123456789.") == (told or "\n")


def test_prompts_are_long_enough_documents_from_the_whole_split(
    corpus: Corpus, tmp_path: Path
) -> None:
    decoded(corpus, tmp_path, DecoderConfig(strategy=ArStrategy(), precision="fp32"))
    samples = read_table(tmp_path / "samples.parquet", SAMPLES).to_pylist()
    path = corpus.tokens / "tokens" / "heldout-00000.parquet"
    documents = read_table(path, TOKENS).to_pylist()
    wanted = [d for d in documents if len(d["token_ids"]) + 1 >= 20 + 8]
    wanted = [wanted[number * len(wanted) // 4] for number in range(4)]
    assert [s["prompt_id"] for s in samples] == [d["doc_id"] for d in wanted]
    assert [s["prompt_ids"] for s in samples] == [d["token_ids"][:20] for d in wanted]


def test_the_header_says_what_ran(corpus: Corpus, tmp_path: Path) -> None:
    decoded(corpus, tmp_path, DecoderConfig(strategy=ArStrategy(), precision="fp32"))
    header, _, complete = read_trace(tmp_path / "trace.arrows")
    assert complete
    assert header["model_sha256"] == sha256(corpus.model / "model.safetensors")
    assert header["seed"] == "3"
    assert header["dtype"] == "fp32"
    assert '"kind": "ar"' in header["decoder"]
    assert header["forbidden"] == header["keep"] == "[]"


def test_controls_reach_the_text_and_the_header(corpus: Corpus, tmp_path: Path) -> None:
    decoder = DecoderConfig(
        strategy=ThresholdStrategy(threshold=0.2),
        extent=FixedExtent(length=5),
        precision="fp32",
        forbidden=(7, 8),
        keep=(" the",),
    )
    counts = decoded(corpus, tmp_path, decoder)
    header, _, _ = read_trace(tmp_path / "trace.arrows")
    samples = read_table(tmp_path / "samples.parquet", SAMPLES).to_pylist()
    assert header["forbidden"] == "[7, 8]"
    for sample in samples:
        assert not {7, 8} & set(sample["token_ids"])
        if len(sample["block_length"]) > 1:
            assert " the" in sample["text"]
    tokens = sum(len(s["token_ids"]) for s in samples)
    assert float(counts["fills_per_token"]) > 0.5
    assert counts["substitutes_per_token"] == 0.0
    assert counts["tokens"] == tokens


def test_too_few_documents(corpus: Corpus, tmp_path: Path) -> None:
    table = read_table(corpus.packed / "packed" / "heldout.pieces.parquet", PIECES)
    enough = sum(p["part"] == 0 and p["n_tokens"] >= 29 for p in table.to_pylist())
    task = ContinuationTask(prompts=1000, prompt_tokens=20, new_tokens=8)
    decoder = DecoderConfig(strategy=ArStrategy(), precision="fp32")
    with pytest.raises(ConfigError, match=rf"prompts=1000: only {enough} held-out documents"):
        decoded(corpus, tmp_path, decoder, task)


def test_another_tokenizers_text_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    from abf.model.store import load_model, save_model
    from abf.model.transformer import Transformer

    config = load_model(corpus.model).config.model_copy(update={"vocab_size": 300})
    save_model(Transformer(config), tmp_path / "model")
    other = Corpus(corpus.packed, corpus.tokenizer, corpus.tokens, tmp_path / "model", corpus.base)
    decoder = DecoderConfig(
        strategy=ThresholdStrategy(), extent=FixedExtent(length=4), precision="fp32"
    )
    with pytest.raises(ArtifactError, match="packed with 320 token ids, the model has 300"):
        decoded(other, tmp_path, decoder)


def test_prompts_say_where_their_blocks_begin(corpus: Corpus, tmp_path: Path) -> None:
    """Blocks are of five tokens, and a prompt of 12 is cut inside its third."""
    decoder = DecoderConfig(strategy=ArStrategy(), precision="fp32")
    decoded(corpus, tmp_path, decoder, ContinuationTask(prompts=3, prompt_tokens=12, new_tokens=8))
    _, table, _ = read_trace(tmp_path / "trace.arrows")
    for request in range(3):
        mine = [e for e in table.to_pylist() if e["request"] == request and e["type"] == "PROMPT"]
        begins = {e["uid"]: e["length"] for e in mine if e["length"] != -1}
        assert begins == {1: 5, 6: 5, 11: 2}
