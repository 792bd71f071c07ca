"""Small stage directories made of real text: standard-library source and a page of prose."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from abf.data.config import LocalSource, PrepareConfig, StdlibSource, TrainedTokenizer
from abf.data.prepare import prepare
from abf.data.sources import fetch
from abf.data.tokenize import tokenize
from abf.data.tokenizer import make_tokenizer

PROSE = [
    "The tide turned at six. Mr. Okafor, who had rowed out alone, let the oars drift and counted "
    "the lamps along the quay: nine, then eight, then nine again.",
    "A bridge is a promise made by two banks. Engineers measure the promise in tonnes; travellers "
    "measure it in minutes. Neither asks the river.",
    "Zoë's café in Kraków opens at 7.30 a.m. and closes when the soup is gone. 🥣 Nobody has ever "
    "seen it closed before noon — not even on the 1st of January.",
    "The moon has no weather. Footprints left there in 1969 are still sharp, and will be for a "
    "million years.\n\nOn Earth the same prints would not survive an afternoon.",
] + [
    f"Entry {n}. On day {n} the survey reached camp {n % 7}, {n * 13} metres above the sea. "
    f"The barometer read {990 + n % 25} hPa. {'Snow fell' if n % 3 else 'It was clear'} until dusk."
    for n in range(60)
]


@pytest.fixture(scope="session")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage directory of `prepare`: two sources, both splits filled."""
    root = tmp_path_factory.mktemp("corpus")
    (root / "prose.jsonl").write_text(
        "".join(json.dumps({"text": text, "n": n}) + "\n" for n, text in enumerate(PROSE))
    )
    raw = [root / "fetch-prose", root / "fetch-code"]
    sources = [
        LocalSource(path=str(root / "prose.jsonl"), licence="CC0-1.0"),
        StdlibSource(pattern="json/*.py"),
    ]
    for source, directory in zip(sources, raw, strict=True):
        directory.mkdir()
        fetch(source, directory)
    out = root / "prepare"
    out.mkdir()
    prepare(PrepareConfig(heldout_fraction=0.2, shard_documents=20), raw, out)
    return out


@pytest.fixture(scope="session")
def tokenizer(documents: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage directory of `tokenizer`."""
    out = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(TrainedTokenizer(vocab_size=600), documents, out)
    return out


@pytest.fixture(scope="session")
def tokens(documents: Path, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage directory of `tokenize`."""
    out = tmp_path_factory.mktemp("tokens")
    tokenize(documents, tokenizer, out)
    return out
