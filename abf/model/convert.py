"""From an AR checkpoint to a block-diffusion model that is the same model, with the proof.

`import_checkpoint` brings a checkpoint into the pipeline as a Hugging Face directory, `convert`
turns such a directory into an ABF model and measures, on real held-out text, that log-probabilities
did not change. All values are nats.
"""

from __future__ import annotations

import gc
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from abf.data.config import PackConfig
from abf.data.loader import PackedBatch, PackedRows
from abf.data.package import fetch_member
from abf.diffusion.config import LossConfig, MaskedCorruption
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.layout import predicted
from abf.diffusion.loss import block_charges, scatter
from abf.errors import ArtifactError
from abf.files import sha256, write_json
from abf.model.config import DirectoryCheckpoint, ImportedBase, PackageCheckpoint
from abf.model.families.base import OURS_ALONE
from abf.model.hf_config import CONFIG, read_config, read_source
from abf.model.huggingface import INDEX, describe, load_hf, save_hf, weight_files
from abf.model.store import WEIGHTS, load_model, new_model, save_model
from abf.model.transformer import Transformer
from abf.track.progress import Progress

__all__ = [
    "convert",
    "import_checkpoint",
    "load_hf",
    "load_model",
    "new_model",
    "save_hf",
    "save_model",
]

IDENTITY_ROWS = 8
"""Held-out rows the identity is measured on, at most."""
IDENTITY_TOLERANCE = 1e-3
"""Largest difference of a token's log-probability, nats; fp32 rounding stays below 1e-4."""
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json", "generation_config.json")


@dataclass(frozen=True)
class Identity:
    """Converted model against its source: log-probabilities of the same tokens, nats a token."""

    tokens: int
    rows: int
    max_abs_diff: float
    mean_abs_diff: float
    source_nll: float
    converted_nll: float
    tolerance: float
    mask_embedding_norm: float
    token_embedding_norm: float
    """Mean norm of a token's embedding, beside which the MASK's should not vanish."""


def import_checkpoint(cfg: ImportedBase, out: Path) -> dict[str, int | float | str]:
    """Write a checkpoint as a Hugging Face directory, `out`/base.

    A GGUF file of a Llama in a Python package is dequantised once, through `transformers`, and
    written in fp32: dequantised values (scale times 4-bit integer plus offset) do not fit 16 bits,
    and fp32 is what training starts from, so nothing is rounded between the package and the first
    step.

    Raises:
        ArtifactError: the checkpoint is missing, damaged, or of an architecture or with tensors
            that this model has not; names it.
    """
    base = out / "base"
    checkpoint = cfg.checkpoint
    if isinstance(checkpoint, PackageCheckpoint):
        counts = _import_package(checkpoint, base, out)
    else:
        counts = _import_directory(checkpoint, base)
    return counts


def _sizes(directory: Path) -> dict[str, int | float | str]:
    """Of a Hugging Face directory, which is refused if this model cannot hold it."""
    state = load_hf(directory).state_dict()
    ours = (state[name].numel() for name in state if not name.startswith(OURS_ALONE))
    return {"parameters": sum(ours), "vocab_size": len(state["embedding.weight"])}


def _import_package(
    checkpoint: PackageCheckpoint, base: Path, out: Path
) -> dict[str, int | float | str]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()  # one bar, and none in a log file
    with (
        tempfile.TemporaryDirectory(dir=out, prefix=".gguf-") as scratch,
        Progress(f"import {checkpoint.requirement}", 4, unit="steps") as progress,
    ):
        member = fetch_member(checkpoint.requirement, checkpoint.member, Path(scratch))
        progress.update(doing="dequantise")
        folder, name = str(member.parent), member.name
        what = f"{checkpoint.requirement}: {checkpoint.member}"
        try:
            config: Any = AutoConfig.from_pretrained(folder, gguf_file=name)
        except (ValueError, OSError, KeyError) as error:
            raise ArtifactError(f"{what} cannot be read: {error}") from error
        if config.model_type != "llama":
            raise ArtifactError(
                f"{what}: architecture {config.model_type!r} is not known in GGUF files; known: "
                "llama"
            )
        # The quantised model refuses to be saved, so its weights go into a plain one.
        quantised: Any = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32
        )
        plain = {
            key: value
            for key, value in quantised.config.to_dict().items()
            if key not in ("quantization_config", "_name_or_path", "transformers_version")
        }
        progress.update(doing="write")
        with torch.device("meta"):
            model: Any = type(quantised)(type(quantised.config)(**plain))
        model.load_state_dict(quantised.state_dict(), assign=True)
        model.tie_weights()
        model.save_pretrained(base)
        # safetensors makes files that only their owner can read
        shutil.copymode(base / CONFIG, base / WEIGHTS)
        progress.update(doing="tokenizer")
        AutoTokenizer.from_pretrained(folder, gguf_file=name).save_pretrained(base)
        progress.update(doing="done")
        return {
            "source": what,
            "licence": checkpoint.licence,
            "source_bytes": member.stat().st_size,
            "source_sha256": sha256(member),
        } | _sizes(base)


def _import_directory(checkpoint: DirectoryCheckpoint, base: Path) -> dict[str, int | float | str]:
    source = Path(checkpoint.path)
    if not source.is_dir():
        raise ArtifactError(f"{source} is no directory; base.checkpoint.path must name one")
    read_config(source)
    files = [*weight_files(source), source / CONFIG, source / "tokenizer.json"]
    if not files[-1].exists():
        raise ArtifactError(f"{source} has no tokenizer.json")
    counts = _sizes(source)  # before it is copied: a fault names the user's own folder
    optional = [source / name for name in (INDEX, *_TOKENIZER_FILES)]
    base.mkdir(parents=True)
    for file in files + [file for file in optional if file.exists()]:
        # Copied, not linked: a later change of the original must not change the artifact.
        shutil.copyfile(file, base / file.name)
    size = sum(file.stat().st_size for file in files)
    return {"source": str(source), "source_bytes": size} | counts


def convert(
    base: Path, packed: Path, pack_cfg: PackConfig, out: Path
) -> dict[str, int | float | str]:
    """Write `out`/init: an ABF model equal to the AR model in `base`/base, and identity.json.

    Prints which tensor became which, and which are new.

    Raises:
        ArtifactError: the text was packed with a tokenizer that does not match the checkpoint, rows
            are longer than the model's context, or the converted model differs from its source.
    """
    source = base / "base"
    heldout = packed / "packed" / "heldout.arrow"
    rows = PackedRows(heldout)
    described = read_source(source)
    config = described.config
    if rows.vocab_size != config.vocab_size:
        raise ArtifactError(
            f"a tokenizer that does not match the checkpoint: {heldout} was packed with "
            f"{rows.vocab_size} token ids, {source} has {config.vocab_size}; "
            "pack with the checkpoint's own tokenizer (tokenizer.kind: checkpoint)"
        )
    if rows.row_length > config.max_positions:
        raise ArtifactError(
            f"{heldout} has rows of {rows.row_length} tokens, {source} a context of "
            f"{config.max_positions} ({described.limit} in its {CONFIG}); lower pack.row_length"
        )
    batches = [rows.rows(np.array([row])) for row in range(min(len(rows), IDENTITY_ROWS))]
    wanted = source_nll(source, batches)
    model = load_hf(source, max_block=pack_cfg.max_block, document_id=rows.document_token)
    print("\n".join(describe(source, model)), flush=True)
    identity = compare(model, batches, wanted)
    if not identity.max_abs_diff <= IDENTITY_TOLERANCE:  # "not": NaN must fail too
        raise ArtifactError(
            f"the converted model is not its source {source}: on {identity.tokens} held-out tokens "
            f"log-probabilities differ by up to {identity.max_abs_diff:.3g} nats (allowed "
            f"{IDENTITY_TOLERANCE:g}); nll {identity.source_nll:.4f} became "
            f"{identity.converted_nll:.4f}"
        )
    save_model(model, out / "init")
    write_json(out / "init" / "identity.json", asdict(identity))
    return asdict(identity)


def source_nll(source: Path, batches: Sequence[PackedBatch]) -> list[NDArray[np.float64]]:
    """NLL of every token but a piece's first, by `transformers`; [B, L] a batch, NaN elsewhere.

    Piece by piece, in an implementation that shares neither attention nor packing with ours.
    """
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    model: Any = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, local_files_only=True, use_safetensors=True
    )
    model.eval()
    found = [np.full(batch.token_ids.shape, np.nan) for batch in batches]
    with Progress("log-probabilities by transformers", len(batches), unit="rows") as progress:
        for batch, nll in zip(batches, found, strict=True):
            _score_pieces(model, batch, nll)
            progress.update()
    del model
    gc.collect()  # so that source and converted model are not in memory together
    return found


def _score_pieces(model: Any, batch: PackedBatch, nll: NDArray[np.float64]) -> None:
    """Fill in the NLL of every piece's tokens but its first."""
    for row, document in enumerate(batch.document_id):
        for number in np.unique(document[document >= 0]):
            slots = np.nonzero(document == number)[0]
            piece = torch.from_numpy(batch.token_ids[row, slots])
            with torch.no_grad():
                log_probs = model(piece[None]).logits[0, :-1].log_softmax(-1)
            nll[row, slots[1:]] = -log_probs.gather(1, piece[1:, None])[:, 0].numpy()


def compare(
    model: Transformer, batches: Sequence[PackedBatch], wanted: Sequence[NDArray[np.float64]]
) -> Identity:
    """Hold the converted model's clean stream, beside a masked noisy stream, against `wanted`."""
    corruption = build_corruption(MaskedCorruption(), mask_id=model.mask_id)
    model.eval()
    pairs = []
    for batch, expected in zip(batches, wanted, strict=True):
        epochs = np.zeros(len(batch.token_ids), dtype=np.int64)
        noised = corruption.apply(batch, seed=0, epochs=epochs)
        with torch.no_grad():
            charges = block_charges(
                model, batch, noised, loss=LossConfig(), backend="tiles", terms=("ar",)
            )
        charged = predicted(batch)  # a source that says NaN is to be compared as well
        pairs.append(np.stack([expected[charged], scatter(charges["ar"], batch)[charged]]))
    source, converted = np.concatenate(pairs, axis=1)
    assert len(source), "held-out rows always hold a token to predict"
    return Identity(
        tokens=len(source),
        rows=sum(len(batch.token_ids) for batch in batches),
        max_abs_diff=float(np.abs(converted - source).max()),
        mean_abs_diff=float(np.abs(converted - source).mean()),
        source_nll=float(source.mean()),
        converted_nll=float(converted.mean()),
        tolerance=IDENTITY_TOLERANCE,
        mask_embedding_norm=model.mask_embedding.norm().item(),
        token_embedding_norm=model.embedding.weight.norm(dim=1).mean().item(),
    )
