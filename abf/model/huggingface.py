"""Hugging Face model directories of the Llama family (Llama, SmolLM2), read and written.

A directory holds `config.json` and `model.safetensors` (or shards with an index). Pickled weights
are never read and no code comes from a directory. Reading needs no `transformers`, which stays an
independent oracle. What this reader does not know is refused by name: a silently ignored bias or
scaling would be another model.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from abf.errors import ArtifactError
from abf.files import write_json
from abf.model.config import ModelConfig, RopeScaling
from abf.model.store import (
    WEIGHTS,
    assemble,
    empty_model,
    load_weights,
    read_json,
    save_weights,
)
from abf.model.transformer import Transformer

CONFIG = "config.json"
INDEX = "model.safetensors.index.json"
ARCHITECTURES = ("LlamaForCausalLM",)

_LAYER_NAMES = {
    "attention_norm": "input_layernorm",
    "mlp_norm": "post_attention_layernorm",
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.o": "self_attn.o_proj",
    "mlp.gate": "mlp.gate_proj",
    "mlp.up": "mlp.up_proj",
    "mlp.down": "mlp.down_proj",
}
_TOP_NAMES = {
    "embedding.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}
_OURS_ALONE = ("mask_embedding", "length_head.weight", "length_head.bias")


def hf_name(name: str) -> str | None:
    """Hugging Face name of one of our tensors; None for those an AR model does not have."""
    if name in _OURS_ALONE:
        return None
    if name in _TOP_NAMES:
        return _TOP_NAMES[name]
    layer = re.fullmatch(r"layers\.(\d+)\.(.+)\.weight", name)
    assert layer is not None, f"no Hugging Face name for {name}"
    return f"model.layers.{layer[1]}.{_LAYER_NAMES[layer[2]]}.weight"


def read_config(
    directory: Path, *, max_block: int = 64, document_id: int | None = None
) -> ModelConfig:
    """Our configuration of a Hugging Face directory.

    Args:
        directory: holds config.json.
        max_block: S, for the length head.
        document_id: token that opens and closes a document; by default the end-of-sequence token.

    Raises:
        ArtifactError: config.json is missing, of another architecture, or asks for something this
            model has not; names the key and its value.
    """
    path = directory / CONFIG
    found: dict[str, Any] = read_json(path)
    architectures = found.get("architectures") or [found.get("model_type", "unknown")]
    if architectures[0] not in ARCHITECTURES:
        raise ArtifactError(
            f"{path}: architecture {architectures[0]!r} is not known; known: "
            f"{', '.join(ARCHITECTURES)}"
        )
    plain = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    for key, expected in plain.items():
        if found.get(key, expected) != expected:
            raise ArtifactError(
                f"{path}: {key}={found[key]!r} is not supported; only {expected!r} is"
            )
    end = found.get("eos_token_id")
    if isinstance(end, list):
        end = end[0]
    try:
        theta, scaling = _rope(found, path)
        heads = found["num_attention_heads"]
        return ModelConfig(
            vocab_size=found["vocab_size"],
            d_model=found["hidden_size"],
            layers=found["num_hidden_layers"],
            heads=heads,
            kv_heads=found.get("num_key_value_heads") or heads,
            head_dim=found.get("head_dim") or found["hidden_size"] // heads,
            d_ff=found["intermediate_size"],
            rope_theta=theta,
            rope_scaling=scaling,
            norm_eps=found.get("rms_norm_eps", 1e-6),
            tie_embeddings=found.get("tie_word_embeddings", False),
            max_positions=found.get("max_position_embeddings", 2048),
            max_block=max_block,
            document_id=(end or 0) if document_id is None else document_id,
        )
    except KeyError as error:
        raise ArtifactError(f"{path} lacks {error}") from None
    except ValidationError as error:
        raise ArtifactError(f"{path} describes no model of ours: {error}") from error


def _rope(found: dict[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling of RoPE, from the new (`rope_parameters`) or the old keys."""
    rope = found.get("rope_parameters") or found.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    theta = float(rope.get("rope_theta", found.get("rope_theta", 10_000.0)))
    if rope.get("partial_rotary_factor", found.get("partial_rotary_factor", 1.0)) != 1.0:
        raise ArtifactError(f"{path}: partial_rotary_factor other than 1 is not supported")
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ArtifactError(
            f"{path}: rope_type {kind!r} is not supported; supported: 'default', 'llama3'"
        )
    return theta, RopeScaling(**{name: rope[name] for name in RopeScaling.model_fields})


def load_hf(directory: Path, *, max_block: int = 64, document_id: int | None = None) -> Transformer:
    """Read a Hugging Face directory as our model; MASK is the mean embedding, lengths uniform.

    Args:
        directory: config.json and safetensors.
        max_block: S, for the length head.
        document_id: as in `read_config`.

    Raises:
        ArtifactError: see `read_config`; or a tensor is missing, unknown or of another shape.
    """
    config = read_config(directory, max_block=max_block, document_id=document_id)
    found: dict[str, Tensor] = {}
    for file in weight_files(directory):
        found.update(load_weights(file))
    _drop_redundant(found, config, directory)
    empty = empty_model(config).state_dict()
    ours = {theirs: name for name in empty if (theirs := hf_name(name)) is not None}
    for theirs in sorted(ours.keys() | found.keys()):
        if theirs not in found:
            raise ArtifactError(f"{directory} lacks tensor {theirs}")
        if theirs not in ours:
            raise ArtifactError(
                f"{directory} holds tensor {theirs}, which {ARCHITECTURES[0]} as described by its "
                f"{CONFIG} has not"
            )
        shape, expected = list(found[theirs].shape), list(empty[ours[theirs]].shape)
        if shape != expected:
            raise ArtifactError(
                f"{directory}: tensor {theirs} has shape {shape}, {CONFIG} says {expected}"
            )
    weights = {ours[theirs]: tensor for theirs, tensor in found.items()}
    weights["mask_embedding"] = torch.zeros(config.d_model)
    weights["length_head.weight"] = torch.zeros(1 + config.max_block, config.d_model)
    weights["length_head.bias"] = torch.zeros(1 + config.max_block)
    model = assemble(config, weights, directory)
    model.reset_mask_embedding()
    return model


def _drop_redundant(found: dict[str, Tensor], config: ModelConfig, directory: Path) -> None:
    """Forget what older checkpoints store twice: rotary tables, and the tied head."""
    for name in [name for name in found if name.endswith(".rotary_emb.inv_freq")]:
        del found[name]
    if config.tie_embeddings and "lm_head.weight" in found:
        head = found.pop("lm_head.weight")
        embedding = found.get("model.embed_tokens.weight")
        if embedding is not None and not torch.equal(head, embedding):
            raise ArtifactError(
                f"{directory}: tie_word_embeddings is true but lm_head.weight differs from "
                "model.embed_tokens.weight"
            )


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a directory, each held against the index where there is one.

    Raises:
        ArtifactError: there is none, one is missing or damaged, or a tensor is not where the index
            says.
    """
    index = directory / INDEX
    if not index.exists():
        if not (directory / WEIGHTS).exists():
            raise ArtifactError(
                f"{directory} holds neither {WEIGHTS} nor {INDEX}; pickled weights (.bin) are not "
                "read: convert them to safetensors first"
            )
        return [directory / WEIGHTS]
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict):
        raise ArtifactError(f"{index} has no weight_map")
    files = sorted({str(file) for file in where.values()})
    for file in files:
        if Path(file).name != file:
            raise ArtifactError(f"{index} points outside its directory: {file!r}")
        names = _tensor_names(directory / file)
        for name in sorted(name for name, home in where.items() if home == file):
            if name not in names:
                raise ArtifactError(f"{directory / file} lacks tensor {name}, listed in {index}")
    return [directory / file for file in files]


def _tensor_names(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as handle:
            return set(handle.keys())
    except FileNotFoundError:
        raise ArtifactError(f"{path} is missing, but the index of its directory names it") from None
    except SafetensorError as error:
        raise ArtifactError(f"{path} cannot be read ({error}); is it truncated?") from error


def save_hf(model: Transformer, directory: Path) -> None:
    """Write the AR view of a model, loadable by `transformers.LlamaForCausalLM`.

    The MASK embedding and the length head have no place there and are left out. Begin- and
    end-of-sequence are the document token.
    """
    directory.mkdir(parents=True, exist_ok=True)
    named = {hf_name(name): tensor for name, tensor in model.state_dict().items()}
    save_weights(
        {name: tensor for name, tensor in named.items() if name is not None}, directory / WEIGHTS
    )
    config = model.config
    scaling = config.rope_scaling
    write_json(
        directory / CONFIG,
        {
            "architectures": [ARCHITECTURES[0]],
            "model_type": "llama",
            "vocab_size": config.vocab_size,
            "hidden_size": config.d_model,
            "intermediate_size": config.d_ff,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": config.max_positions,
            "rms_norm_eps": config.norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": scaling and {"rope_type": "llama3", **scaling.model_dump()},
            "tie_word_embeddings": config.tie_embeddings,
            "attention_bias": False,
            "mlp_bias": False,
            "bos_token_id": config.document_id,
            "eos_token_id": config.document_id,
            "torch_dtype": "float32",
        },
    )
