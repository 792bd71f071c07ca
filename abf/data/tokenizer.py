"""Byte-level BPE: trained on the corpus or taken from the checkpoint, and exact about bytes.

Folder `tokenizer/`: tokenizer.json (Hugging Face `tokenizers`) and meta.json {kind, vocab_size,
document_id, document_token}. vocab_size is the size of the model's embedding; ids lie below it.
Offsets: char_start is the character that holds a token's first byte, byte_start that byte.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow.parquet as pq
from tokenizers import Tokenizer as HFTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from abf.artifacts import DOCUMENTS, read_table, shards
from abf.data.config import Tokenizer, TrainedTokenizer
from abf.errors import ArtifactError, ConfigError
from abf.files import write_json, write_text
from abf.track.progress import Progress

UIntArray = npt.NDArray[np.uint32]

DOCUMENT_TOKEN = "<|document|>"
"""Opens and closes a document in a trained tokenizer; its id is 0."""


# --- the stage ----------------------------------------------------------------------------------


def make_tokenizer(cfg: Tokenizer, source: Path, out: Path) -> dict[str, int | float | str]:
    """Write `out`/tokenizer/.

    Args:
        source: stage directory of `prepare` (kind trained: its train split is read) or of `base`
            (kind checkpoint).

    Raises:
        ArtifactError: the tokenizer does not fit the checkpoint; names both numbers.
        ConfigError: the checkpoint's tokenizer has no such document token; names those there are.
    """
    if isinstance(cfg, TrainedTokenizer):
        tokenizer = _train(cfg, source)
        token, vocab_size, text = DOCUMENT_TOKEN, _entries(tokenizer), tokenizer.to_str(pretty=True)
    else:
        path = source / "base" / "tokenizer.json"
        tokenizer = _read(path)
        token, text = cfg.document_token, path.read_text(encoding="utf-8")
        vocab_size = _fitting_vocab_size(tokenizer, token, source / "base")
    folder = out / "tokenizer"
    write_text(folder / "tokenizer.json", text)
    meta = {
        "kind": cfg.kind,
        "vocab_size": vocab_size,
        "document_id": tokenizer.token_to_id(token),
        "document_token": token,
    }
    write_json(folder / "meta.json", meta)
    return {**meta, "n_entries": _entries(tokenizer)}


def _train(cfg: TrainedTokenizer, source: Path) -> HFTokenizer:
    tokenizer = HFTokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=cfg.vocab_size,
        special_tokens=[DOCUMENT_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    files = shards(source / "documents", "train")
    total = sum(pq.read_metadata(path).num_rows for path in files)
    with Progress("read text for the tokenizer", total, unit="documents") as progress:
        tokenizer.train_from_iterator(_texts(files, progress), trainer, length=total)
    return tokenizer


def _texts(files: Sequence[Path], progress: Progress) -> Iterator[str]:
    for path in files:
        for text in read_table(path, DOCUMENTS).column("text"):
            progress.update()
            yield text.as_py()


def _fitting_vocab_size(tokenizer: HFTokenizer, token: str, base: Path) -> int:
    """The checkpoint's vocabulary size, once the tokenizer is known to belong to it."""
    config = base / "config.json"
    try:
        vocab_size = int(json.loads(config.read_text(encoding="utf-8"))["vocab_size"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{config} gives no vocab_size: {error!r}") from error
    entries = _entries(tokenizer)
    if entries > vocab_size:
        raise ArtifactError(
            f"the tokenizer in {base} has {entries} ids, but its checkpoint has an embedding of "
            f"only {vocab_size} (config.json): they do not belong together"
        )
    if tokenizer.token_to_id(token) is None:
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        raise ConfigError(
            f"tokenizer.document_token: {token!r} is not in the checkpoint's tokenizer; "
            f"its special tokens are {', '.join(special) or 'none'}"
        )
    return vocab_size


def _entries(tokenizer: HFTokenizer) -> int:
    return max(tokenizer.get_vocab(with_added_tokens=True).values()) + 1


def _read(path: Path) -> HFTokenizer:
    if not path.is_file():
        raise ArtifactError(f"{path} is missing; rerun the stage that writes it")
    try:
        return HFTokenizer.from_file(str(path))
    except Exception as error:  # `tokenizers` raises nothing narrower
        raise ArtifactError(f"{path} is no tokenizer: {error}") from error


# --- the tokenizer in use -----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Encoded:
    """Tokens of one text of n_bytes bytes: uint32 [n] each, starts never decrease."""

    ids: UIntArray
    char_start: UIntArray
    byte_start: UIntArray
    n_bytes: int


class TextTokenizer:
    """A tokenizer as the pipeline uses it: text to ids and offsets, ids to text, no extras.

    Text that spells a special token is ordinary text: only the pipeline places document tokens.
    """

    def __init__(self, tokenizer: HFTokenizer, *, vocab_size: int, document_id: int) -> None:
        self.vocab_size = vocab_size
        self.document_id = document_id
        self._tokenizer = tokenizer
        tokenizer.encode_special_tokens = True
        tokenizer.no_truncation()
        tokenizer.no_padding()
        self._bytes = _token_bytes(tokenizer)
        sizes = [0] if self._bytes is None else [len(piece) for piece in self._bytes]
        self._sizes = np.array(sizes, dtype=np.int64)

    def spans(self, texts: Sequence[str]) -> list[Encoded]:
        """Encode texts. Exact where the tokens' bytes spell the text, as in byte-level BPE without
        normalisation; otherwise starts come from the offsets `tokenizers` reports."""
        batch = list(texts)
        found = self._tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        return [
            self._spans(text, encoding.ids) for text, encoding in zip(batch, found, strict=True)
        ]

    def _spans(self, text: str, ids: list[int]) -> Encoded:
        data = text.encode("utf-8")
        tokens = np.array(ids, dtype=np.uint32)
        table = self._bytes
        if table is not None and b"".join([table[i] for i in ids]) == data:
            ends = np.cumsum(self._sizes[tokens])
            byte_start = np.zeros(len(tokens), np.int64)
            byte_start[1:] = ends[:-1]
            char_start = byte_start
            if len(data) != len(text):
                lead = (np.frombuffer(data, np.uint8) & 0xC0) != 0x80
                char_start = (np.cumsum(lead) - 1)[byte_start]
        else:
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            char_start = np.array([start for start, _ in encoding.offsets], dtype=np.int64)
            char_start = np.maximum.accumulate(char_start)
            char_start[:1] = 0
            byte_start = char_bytes(text)[char_start]
        return Encoded(
            tokens, char_start.astype(np.uint32), byte_start.astype(np.uint32), len(data)
        )

    def decode(self, ids: Iterable[int]) -> str:
        """Text of the ids; bytes that are no UTF-8 become U+FFFD, special tokens their name."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)

    def token_strings(self, ids: Iterable[int]) -> list[str]:
        """Each token by itself; part of a character, or an id without a token, shows as U+FFFD."""
        return [self._string(int(i)) for i in ids]

    def _string(self, index: int) -> str:
        if self._bytes is None:
            return self._tokenizer.id_to_token(index) or "\ufffd"
        if index >= len(self._bytes):
            return "\ufffd"
        return self._bytes[index].decode("utf-8", errors="replace")


def load_tokenizer(directory: Path) -> TextTokenizer:
    """Read a `tokenizer/` folder.

    Raises:
        ArtifactError: a file is missing or damaged, or the two do not belong together.
    """
    tokenizer = _read(directory / "tokenizer.json")
    path = directory / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        vocab_size, document_id = int(meta["vocab_size"]), int(meta["document_id"])
        token = meta["document_token"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ArtifactError(f"{path} cannot be used: {error!r}; rerun tokenizer") from error
    entries = _entries(tokenizer)
    if tokenizer.token_to_id(token) != document_id or entries > vocab_size:
        raise ArtifactError(
            f"{directory}: tokenizer.json has {entries} entries and {token!r} = "
            f"{tokenizer.token_to_id(token)}, meta.json says {vocab_size} and {document_id}; "
            "delete the stage directory and run the same command again"
        )
    return TextTokenizer(tokenizer, vocab_size=vocab_size, document_id=document_id)


def char_bytes(text: str) -> npt.NDArray[np.int64]:
    """Byte offset of every character of `text` and of its end: int64 [len(text) + 1]."""
    data = np.frombuffer(text.encode("utf-8"), np.uint8)
    return np.append(np.flatnonzero((data & 0xC0) != 0x80), len(data))


def _token_bytes(tokenizer: HFTokenizer) -> list[bytes] | None:
    """Bytes of every token id, or None when the vocabulary is not byte-level."""
    byte_of = _byte_alphabet()
    added = tokenizer.get_added_tokens_decoder()
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocabulary.values()) + 1)
    for string, index in vocabulary.items():
        if index in added:
            table[index] = added[index].content.encode("utf-8")
        elif all(char in byte_of for char in string):
            table[index] = bytes(byte_of[char] for char in string)
        else:
            return None
    return table


def _byte_alphabet() -> dict[str, int]:
    """The printable character that byte-level BPE writes for each byte, inverted.

    GPT-2's table (openai/gpt-2, src/encoder.py, bytes_to_unicode): printable Latin-1 bytes stand
    for themselves, the others for U+0100 onwards in order.
    """
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in set(printable)]
    table = {chr(byte): byte for byte in printable}
    return table | {chr(256 + i): byte for i, byte in enumerate(others)}
