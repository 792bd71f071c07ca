"""config.json of a Hugging Face directory, read as a `ModelConfig` and written from one.

What the transformer does not compute is refused by name: a scaling or a window that is silently
left out would be another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from abf.errors import ArtifactError
from abf.model.config import (
    LinearScaling,
    Llama3Scaling,
    ModelConfig,
    RopeScaling,
    YarnScaling,
)
from abf.model.families.base import Family, family, find_family
from abf.model.store import read_json

CONFIG = "config.json"
_SCALINGS = {"linear": LinearScaling, "llama3": Llama3Scaling, "yarn": YarnScaling}


@dataclass(frozen=True)
class Source:
    """What a config.json says."""

    family: Family
    config: ModelConfig
    limit: str
    """The key that bounds `config.max_positions`."""


def read_config(
    directory: Path, *, max_block: int = 64, document_id: int | None = None
) -> ModelConfig:
    """Our configuration of a Hugging Face directory; arguments and errors as in `read_source`."""
    return read_source(directory, max_block=max_block, document_id=document_id).config


def read_source(directory: Path, *, max_block: int = 64, document_id: int | None = None) -> Source:
    """Family and configuration of a Hugging Face directory.

    The longest sequence is the smaller of the positions the model has and of its sliding window:
    within that, a window is no window.

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
    which = find_family(found, path)
    found = {**which.defaults, **found}
    only = which.only | {"quantization_config": None}
    for key, expected in only.items():
        if found.get(key, expected) != expected:
            raise ArtifactError(
                f"{path}: {key}={found[key]!r} is not supported; only {expected!r} is"
            )
    try:
        end = found.get("eos_token_id")
        if isinstance(end, list):
            end = end[0] if end else None
        fields = {field: found[key] for field, key in which.keys.items()} | which.fixed
        if fields.get("kv_heads") is None:
            fields["kv_heads"] = fields["heads"]
        if fields.get("head_dim") is None:
            fields["head_dim"] = fields["d_model"] // fields["heads"]
        if fields["d_ff"] is None:
            fields["d_ff"] = 4 * fields["d_model"]
        if fields.get("positions") != "learned":
            fields["rope_theta"], fields["rope_scaling"] = _rope(found, path)
        limit = which.keys["max_positions"]
        window = which.window(found)
        if window is not None and window < fields["max_positions"]:
            limit, fields["max_positions"] = "sliding_window", window
        config = ModelConfig(
            family=which.name,
            max_block=max_block,
            document_id=(end or 0) if document_id is None else document_id,
            **fields,
        )
    except KeyError as error:
        raise ArtifactError(f"{path} lacks {error}") from None
    except ValidationError as error:
        wrong = "; ".join(
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}".removeprefix(": ")
            for one in error.errors()
        )
        raise ArtifactError(f"{path} describes no model of ours: {wrong}") from error
    except (TypeError, ValueError, ArithmeticError) as error:  # ValidationError is a ValueError
        raise ArtifactError(f"{path} describes no model of ours: {error}") from error
    return Source(which, config, limit)


def _rope(found: Mapping[str, Any], path: Path) -> tuple[float, RopeScaling | None]:
    """Base and scaling of RoPE, from the new (`rope_parameters`) or the old keys."""
    said = found.get("rope_parameters") or found.get("rope_scaling") or {}
    if not isinstance(said, Mapping):
        raise ArtifactError(f"{path}: rope_scaling={said!r} is not supported; a mapping is")
    rope = {key: value for key, value in said.items() if value is not None}
    old = rope.pop("type", "default")
    kind = rope.pop("rope_type", old)
    theta = float(rope.pop("rope_theta", found.get("rope_theta") or 10_000.0))
    partial = rope.pop("partial_rotary_factor", found.get("partial_rotary_factor"))
    if partial not in (None, 1.0):
        raise ArtifactError(
            f"{path}: partial_rotary_factor={partial!r} is not supported; only 1 is"
        )
    if kind != "default" and kind not in _SCALINGS:
        raise ArtifactError(
            f"{path}: rope_type {kind!r} is not supported; supported: default, "
            f"{', '.join(_SCALINGS)}"
        )
    if kind in ("llama3", "yarn"):
        rope.setdefault("original_max_position_embeddings", found["max_position_embeddings"])
        if outside := found.get("original_max_position_embeddings"):
            rope["original_max_position_embeddings"] = outside
    if kind == "yarn":
        both = rope.pop("mscale", 0), rope.pop("mscale_all_dim", 0)
        rope.setdefault("attention_factor", _yarn_stretch(rope["factor"], *both))
    scaling = _SCALINGS.get(kind)
    known = scaling.model_fields if scaling else {}
    if unknown := sorted(rope.keys() - known):
        raise ArtifactError(f"{path}: RoPE of type {kind!r} with {unknown[0]!r} is not supported")
    return theta, scaling(**rope) if scaling else None


def _yarn_stretch(factor: float, mscale: float, mscale_all_dim: float) -> float:
    """The attention factor where none is given, as `transformers` infers it."""

    def stretch(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    if mscale and mscale_all_dim:
        return stretch(mscale) / stretch(mscale_all_dim)
    return stretch(1.0)


def config_json(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model's family that describes its AR view, in fp32.

    Begin- and end-of-sequence are the document token.
    """
    which = family(config.family)
    values = config.model_dump(mode="json")
    for field, value in which.fixed.items():
        assert values[field] == value, f"a {which.name} with {field}={values[field]!r}"
    found = {"architectures": [which.architecture], "model_type": which.name}
    found |= {key: values[field] for field, key in which.keys.items()}
    found |= which.only | which.switched_off
    if config.positions == "rotary":
        scaling = values["rope_scaling"]
        found["rope_theta"] = config.rope_theta
        found["rope_scaling"] = scaling and {"rope_type": scaling.pop("kind"), **scaling}
    ends = {"bos_token_id": config.document_id, "eos_token_id": config.document_id}
    return found | ends | {"torch_dtype": "float32"}
