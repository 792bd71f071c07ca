"""ABF model directories: `model.safetensors` (fp32) and `model_config.json`; and new models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from abf.errors import ArtifactError
from abf.files import atomic_path, write_json
from abf.model.config import ModelConfig, ShapeConfig
from abf.model.rope import rope_frequencies
from abf.model.transformer import Transformer

WEIGHTS = "model.safetensors"
MODEL_CONFIG = "model_config.json"


def new_model(
    shape: ShapeConfig,
    *,
    vocab_size: int,
    document_id: int,
    max_block: int,
    max_positions: int,
    seed: int,
) -> Transformer:
    """A model with random weights, a pure function of its arguments.

    Args:
        shape: width, layers and heads.
        vocab_size: V of the tokenizer.
        document_id: token that opens and closes a document.
        max_block: S, longest block.
        max_positions: longest piece in tokens.
        seed: seed of the weights.
    """
    config = ModelConfig(
        vocab_size=vocab_size,
        d_model=shape.d_model,
        layers=shape.layers,
        heads=shape.heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.d_model // shape.heads,
        d_ff=shape.d_ff,
        max_positions=max_positions,
        max_block=max_block,
        document_id=document_id,
    )
    model = empty_model(config).to_empty(device="cpu")
    model.rope = rope_frequencies(config)
    model.initialise(torch.Generator().manual_seed(seed), std=shape.init_std)
    return model


def save_model(model: Transformer, directory: Path) -> None:
    """Write an ABF model directory.

    Raises:
        ArtifactError: the weights could not be written (disk full ...); names the file.
    """
    directory.mkdir(parents=True, exist_ok=True)
    save_weights(dict(model.state_dict()), directory / WEIGHTS)
    write_json(directory / MODEL_CONFIG, model.config.model_dump(mode="json"))


def load_model(directory: Path) -> Transformer:
    """Read an ABF model directory.

    Raises:
        ArtifactError: a file is missing, truncated, or does not fit the other; names it.
    """
    path = directory / MODEL_CONFIG
    try:
        config = ModelConfig.model_validate_json(path.read_text())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; rerun the stage that writes it") from None
    except ValidationError as error:
        raise ArtifactError(f"{path} is no model configuration: {error}") from error
    return assemble(config, load_weights(directory / WEIGHTS), directory / WEIGHTS)


def with_edit_heads(model: Transformer) -> Transformer:
    """The same model with heads that edit, at their start; itself where it has them."""
    if model.config.edit_heads:
        return model
    grown = _grown(model, edit_heads=True)
    grown.reset_edit_heads()
    return grown


def with_granularities(model: Transformer, lengths: tuple[int, ...]) -> Transformer:
    """The same model, able to be told these granularities; itself where it is or where there is
    none. Whatever it is told makes no difference yet.

    Args:
        model: one that knows no other granularities.
        lengths: mean block lengths in tokens, ascending.
    """
    if not lengths or model.config.granularities == lengths:
        return model
    assert not model.config.granularities, "a model learns its granularities in one training"
    grown = _grown(model, granularities=lengths)
    grown.reset_granularities()
    return grown


def _grown(model: Transformer, **changes: object) -> Transformer:
    """A model of a changed configuration with this one's weights; what is new is not set."""
    config = model.config.model_copy(update=changes)
    grown = empty_model(config).to_empty(device=model.head_weight.device)
    grown.load_state_dict(model.state_dict(), strict=False)
    grown.rope = rope_frequencies(config).to(model.head_weight.device)
    return grown


def empty_model(config: ModelConfig) -> Transformer:
    """The model without memory behind its weights."""
    with torch.device("meta"):
        return Transformer(config)


def assemble(config: ModelConfig, weights: Mapping[str, Tensor], source: Path) -> Transformer:
    """Model of this configuration with these weights, as fp32.

    Raises:
        ArtifactError: a tensor is missing, unknown, or of another shape; names it and `source`.
    """
    model = empty_model(config)
    expected = {name: tensor.shape for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            raise ArtifactError(f"{source} lacks tensor {name}, {list(expected[name])}")
        if name not in expected:
            raise ArtifactError(f"{source} holds tensor {name}, unknown to this model")
        if weights[name].shape != expected[name]:
            raise ArtifactError(
                f"{source}: tensor {name} has shape {list(weights[name].shape)}, "
                f"the configuration says {list(expected[name])}"
            )
    # copy: tensors from safetensors may be mapped from the file, which may be replaced later
    state = {name: tensor.to(torch.float32, copy=True) for name, tensor in weights.items()}
    model.load_state_dict(state, assign=True)
    model.rope = rope_frequencies(config)
    return model


def save_weights(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write tensors as safetensors, atomically."""
    contiguous = {name: tensor.detach().contiguous() for name, tensor in weights.items()}
    try:
        with atomic_path(path) as temporary:
            temporary.touch()
            mode = temporary.stat().st_mode
            save_file(contiguous, temporary, metadata={"format": "pt"})
            temporary.chmod(mode)  # safetensors makes files that only their owner can read
    except SafetensorError as error:
        raise ArtifactError(f"{path} could not be written: {error}") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ArtifactError: it is missing or truncated.
    """
    try:
        return load_file(path)
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing; rerun the stage that writes it") from None
    except SafetensorError as error:
        raise ArtifactError(
            f"{path} cannot be read ({error}); it is truncated or no safetensors file"
        ) from error


def read_json(path: Path) -> dict[str, object]:
    """Read a JSON object.

    Raises:
        ArtifactError: it is missing or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing") from None
    except OSError as error:
        raise ArtifactError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise ArtifactError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path} is not a JSON object")
    return value
