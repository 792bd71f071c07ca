"""Documents whose tokens are GPT-2's pre-tokens, and small stage directories of real text."""

from __future__ import annotations

import sysconfig
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from tokenizers import pre_tokenizers

from abf.artifacts import DOCUMENTS, TOKENS, write_table
from abf.segment.base import Document

PROSE = """Mr. Hale had kept the light for thirty years. He knew its 3.5 tonnes of glass by heart.

"Does it ever go out?" the girl asked. It had gone out once, on 4 May 1931, for eleven minutes. \
J. K. Moss of the harbour board wrote a letter (he never answered it). "Keep it," he said!

Nothing happened for a long time. Then the fog came in: first a smell, then a colour, then nothing \
at all. The horn spoke every 30 seconds. Zoë counted them in bed, and fell asleep at forty-one."""


def pretokens(text: str) -> list[tuple[int, int]]:
    """(first character, end) of GPT-2's pre-tokens."""
    split = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return [span for _, span in split.pre_tokenize_str(text)]


def byte_starts(text: str) -> np.ndarray:
    return np.array([len(text[:a].encode()) for a, _ in pretokens(text)], dtype=np.int64)


@pytest.fixture
def make() -> Callable[..., Document]:
    def document(text: str, language: str = "en", doc_id: str = "d") -> Document:
        return Document(doc_id, text, language, byte_starts(text))

    return document


@pytest.fixture
def prose() -> str:
    return PROSE


@pytest.fixture(scope="session")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the stage directories `prepare` and `tokenize`: prose and source code."""
    root = tmp_path_factory.mktemp("stages")
    library = Path(sysconfig.get_paths()["stdlib"])
    code = {name: (library / name).read_text("utf-8") for name in ("bisect.py", "textwrap.py")}
    sentences = [part for part in PROSE.replace("\n", " ").split(". ") if part]
    texts = {f"prose-{n}": ". ".join(sentences[n % 3 : n + 2]) + "." for n in range(12)}
    rows = [(name, text, "en") for name, text in texts.items()]
    rows += [(name, text, "python") for name, text in code.items()]
    parts = {"train-00000": rows[:8], "train-00001": rows[8:13], "heldout-00000": rows[13:]}
    for name, part in parts.items():
        content = [text for _, text, _ in part]
        starts = [byte_starts(text).tolist() for text in content]
        documents = {
            "doc_id": [doc_id for doc_id, _, _ in part],
            "text": content,
            "source": ["test"] * len(part),
            "licence": ["CC0-1.0"] * len(part),
            "language": [language for _, _, language in part],
        }
        tokens = {
            "doc_id": documents["doc_id"],
            "token_ids": [list(range(len(one))) for one in starts],
            "char_start": [[a for a, _ in pretokens(text)] for text in content],
            "byte_start": starts,
            "n_bytes": [len(text.encode()) for text in content],
        }
        path = root / "prepare/documents" / f"{name}.parquet"
        write_table(path, pa.table(documents), DOCUMENTS)
        write_table(root / "tokenize/tokens" / f"{name}.parquet", pa.table(tokens), TOKENS)
    return root
