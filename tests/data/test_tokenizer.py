"""The tokenizer: exact round trips, offsets, and a tokenizer that does not fit its checkpoint."""

from __future__ import annotations

import json
import sysconfig
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from abf.data.config import CheckpointTokenizer, TrainedTokenizer
from abf.data.tokenizer import TextTokenizer, char_bytes, load_tokenizer, make_tokenizer
from abf.errors import ArtifactError, ConfigError

AWKWARD = [
    "",
    " ",
    "x",
    "  two  spaces \n\n\tand tabs\n",
    "Zoë's 🥣 costs 3½ złoty — 東京",
    "<|document|> is only text here<|document|>",
    "e\u0301 decomposed, \ufeff mark, \x00 nul, \u200b space",
    "👩‍👩‍👧 family",
]


@pytest.fixture(scope="module")
def trained(tokenizer: Path) -> TextTokenizer:
    return load_tokenizer(tokenizer / "tokenizer")


def check_spans(tokenizer: TextTokenizer, text: str) -> None:
    """Hold offsets against the bytes of each token, decoded one by one."""
    (span,) = tokenizer.spans([text])
    data = text.encode()
    assert span.n_bytes == len(data)
    pieces = [data[a:b] for a, b in pairwise([*span.byte_start.tolist(), len(data)])]
    assert b"".join(pieces) == data
    assert all(pieces)
    shown = [piece.decode("utf-8", errors="replace") for piece in pieces]
    assert tokenizer.token_strings(span.ids) == shown
    for start, char in zip(span.byte_start.tolist(), span.char_start.tolist(), strict=True):
        before = len(text[:char].encode())
        assert before <= start < before + len(text[char].encode())
    assert tokenizer.decode(span.ids) == text


@pytest.mark.parametrize("text", AWKWARD)
def test_awkward_texts(trained: TextTokenizer, text: str) -> None:
    check_spans(trained, text)


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=60))
def test_any_text(trained: TextTokenizer, text: str) -> None:
    check_spans(trained, text)


def test_real_source_files(trained: TextTokenizer) -> None:
    root = Path(sysconfig.get_paths()["stdlib"])
    for name in ("this.py", "textwrap.py", "locale.py", "json/decoder.py"):
        check_spans(trained, (root / name).read_text("utf-8"))


def test_text_never_becomes_the_document_token(trained: TextTokenizer) -> None:
    assert trained.document_id == 0
    (encoded,) = trained.spans(["a<|document|>b"])
    ids = encoded.ids
    assert 0 not in ids
    assert ids.dtype == np.uint32
    assert trained.decode([0]) == "<|document|>"


def test_ids_without_a_token_are_shown_as_unknown(trained: TextTokenizer) -> None:
    assert trained.token_strings([trained.vocab_size + 5]) == ["\ufffd"]


def test_char_bytes() -> None:
    assert char_bytes("aé東🥣").tolist() == [0, 1, 3, 6, 10]
    assert char_bytes("").tolist() == [0]


def test_training_is_deterministic(documents: Path, tokenizer: Path, tmp_path: Path) -> None:
    counts = make_tokenizer(TrainedTokenizer(vocab_size=600), documents, tmp_path)
    for name in ("tokenizer.json", "meta.json"):
        again, before = tmp_path / "tokenizer" / name, tokenizer / "tokenizer" / name
        assert again.read_bytes() == before.read_bytes()
    assert counts["vocab_size"] == counts["n_entries"] == 600


def test_little_text_gives_a_smaller_vocabulary(documents: Path, tmp_path: Path) -> None:
    counts = make_tokenizer(TrainedTokenizer(vocab_size=100_000), documents, tmp_path)
    loaded = load_tokenizer(tmp_path / "tokenizer")
    assert 260 < loaded.vocab_size < 100_000
    assert counts["vocab_size"] == loaded.vocab_size


# --- checkpoints --------------------------------------------------------------------------------


@pytest.fixture
def base(tokenizer: Path, tmp_path: Path) -> Path:
    """Stage directory of `base` with our tokenizer in it and a larger embedding."""
    folder = tmp_path / "stage" / "base"
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes((tokenizer / "tokenizer/tokenizer.json").read_bytes())
    (folder / "config.json").write_text(json.dumps({"vocab_size": 640}))
    return folder.parent


def test_checkpoint_tokenizer_is_copied(base: Path, tmp_path: Path) -> None:
    cfg = CheckpointTokenizer(document_token="<|document|>")
    make_tokenizer(cfg, base, tmp_path)
    copy, original = tmp_path / "tokenizer/tokenizer.json", base / "base/tokenizer.json"
    assert copy.read_bytes() == original.read_bytes()
    assert load_tokenizer(tmp_path / "tokenizer").vocab_size == 640


def test_checkpoint_with_too_small_an_embedding(base: Path, tmp_path: Path) -> None:
    (base / "base" / "config.json").write_text(json.dumps({"vocab_size": 599}))
    with pytest.raises(ArtifactError, match=r"has 600 ids.*an embedding of only 599"):
        make_tokenizer(CheckpointTokenizer(document_token="<|document|>"), base, tmp_path)


def test_unknown_document_token_lists_those_there_are(base: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"document_token: '<s>'.* tokens are <\|document\|>"):
        make_tokenizer(CheckpointTokenizer(document_token="<s>"), base, tmp_path)


@pytest.mark.parametrize("content", ["{", '{"vocab_size": "many"}', "{}", "[]"])
def test_checkpoint_config_without_a_size(base: Path, tmp_path: Path, content: str) -> None:
    (base / "base" / "config.json").write_text(content)
    with pytest.raises(ArtifactError, match=r"config\.json gives no vocab_size"):
        make_tokenizer(CheckpointTokenizer(document_token="<|document|>"), base, tmp_path)


def test_truncation_and_padding_of_a_checkpoint_are_switched_off(tokenizer: Path) -> None:
    inner = HFTokenizer.from_file(str(tokenizer / "tokenizer/tokenizer.json"))
    inner.enable_truncation(4)
    inner.enable_padding(length=50)
    check_spans(TextTokenizer(inner, vocab_size=600, document_id=0), "long enough to be cut short")


def test_a_normalising_tokenizer_falls_back_on_its_offsets() -> None:
    inner = HFTokenizer(models.BPE())
    inner.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=257,
        special_tokens=["<|document|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["ab"], trainer)
    tokenizer = TextTokenizer(inner, vocab_size=257, document_id=0)
    text = "Cafe\u0301 DE Zoë"
    (span,) = tokenizer.spans([text])
    assert span.byte_start[0] == 0
    assert (np.diff(span.byte_start.astype(int)) >= 0).all()
    assert span.byte_start[-1] < span.n_bytes == len(text.encode())
    assert span.byte_start.tolist() == [char_bytes(text)[c] for c in span.char_start]
    assert tokenizer.token_strings([span.ids[-1]]) == ["\ufffd"]  # half of the ë


# --- damaged folders ----------------------------------------------------------------------------


def test_damaged_tokenizer_folders(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is missing"):
        load_tokenizer(tmp_path)
    whole = (tokenizer / "tokenizer" / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(whole[:5000])
    with pytest.raises(ArtifactError, match=r"tokenizer\.json is no tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(whole)
    with pytest.raises(ArtifactError, match=r"meta\.json cannot be used"):
        load_tokenizer(tmp_path)
    meta = json.loads((tokenizer / "tokenizer" / "meta.json").read_text())
    for change in ({"document_id": 5}, {"vocab_size": 599}):
        (tmp_path / "meta.json").write_text(json.dumps({**meta, **change}))
        with pytest.raises(ArtifactError, match=r"has 600 entries and '<\|document\|>' = 0"):
            load_tokenizer(tmp_path)


# --- the tokenize stage -------------------------------------------------------------------------


def test_tokenize_keeps_documents_and_loses_nothing(
    documents: Path, tokens: Path, trained: TextTokenizer
) -> None:
    names = sorted(path.name for path in (documents / "documents").iterdir())
    assert names == sorted(path.name for path in (tokens / "tokens").iterdir())
    assert sum(name.startswith("train") for name in names) > 1
    for name in names:
        text = pq.read_table(documents / "documents" / name).to_pylist()
        rows = pq.read_table(tokens / "tokens" / name).to_pylist()
        assert [row["doc_id"] for row in rows] == [row["doc_id"] for row in text]
        for row, source in zip(rows, text, strict=True):
            data = source["text"].encode()
            assert row["n_bytes"] == len(data)
            assert trained.decode(row["token_ids"]) == source["text"]
            assert np.diff([*row["byte_start"], len(data)]).sum() == len(data)
            assert len(row["char_start"]) == len(row["token_ids"])
