"""What tells one family of Hugging Face directories from another: names of tensors and of keys.

A family is a `Family` in a file of its own, named in `abf.model.config.FamilyName`; nothing else
knows it. Tables are read both ways, so what is imported can be exported.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, get_args

from abf.errors import ArtifactError
from abf.model.config import FamilyName

OURS_ALONE = ("mask_embedding", "end_embedding", "length_head.", "edit_head.", "granularity_")
"""Beginnings of the names of tensors that no AR model has."""
HEAD = "lm_head.weight"
"""The untied output matrix, in every family."""


@dataclass(frozen=True)
class Family:
    """One family's names."""

    name: FamilyName
    """`model_type` in config.json."""
    architecture: str
    """`architectures` in config.json: the class of `transformers` that the equality is about."""
    prefix: str
    """Before every tensor's name but the head's; a checkpoint of the bare model lacks it."""
    modules: dict[str, tuple[str, ...]]
    """Their module -> ours that it holds, stacked along outputs; `*` is a layer's number."""
    keys: dict[str, str]
    """Field of `ModelConfig` -> key of config.json."""
    defaults: dict[str, Any]
    """What `transformers` takes an absent key for."""
    fixed: dict[str, Any] = field(default_factory=dict)
    """Fields of `ModelConfig` that every model of the family has in common."""
    only: dict[str, Any] = field(default_factory=dict)
    """Keys of which the transformer computes one value alone."""
    switched_off: dict[str, Any] = field(default_factory=dict)
    """Keys and values without which an export would have a sliding window."""
    window: Callable[[Mapping[str, Any]], int | None] = lambda found: None
    """Positions that some layer's sliding window spans; None without one."""
    transposed: bool = False
    """Matrices in the layers are stored [inputs, outputs]."""
    redundant: str = r".*\.rotary_emb\.inv_freq"
    """Tensors of old checkpoints that hold no weights; a regular expression."""


class Stored(NamedTuple):
    """One tensor of a directory."""

    name: str
    ours: tuple[str, ...]
    """Names of ours that it holds, stacked along outputs."""
    transposed: bool
    module: str
    """Its name with `*` for the layer's number."""


def family(name: FamilyName) -> Family:
    """The family of this name."""
    return importlib.import_module(f"abf.model.families.{name}").FAMILY


def find_family(found: Mapping[str, Any], path: Path) -> Family:
    """The family of a config.json.

    Raises:
        ArtifactError: its architecture is not known; names it and those that are.
    """
    families = [family(name) for name in get_args(FamilyName)]
    named = found.get("architectures")
    wanted = named[0] if isinstance(named, list) and named else named or None
    for one in families:
        if wanted == one.architecture or (wanted is None and found.get("model_type") == one.name):
            return one
    raise ArtifactError(
        f"{path}: architecture {wanted or found.get('model_type', 'unknown')!r} is not known; "
        f"known: {', '.join(one.architecture for one in families)}"
    )


def stored(which: Family, ours: Iterable[str], *, bare: bool = False) -> list[Stored]:
    """The tensors of a directory that hold a model's tensors `ours`, in the order of the tables.

    Args:
        which: the family.
        ours: names in the model's state; those of `OURS_ALONE` are left out.
        bare: names come without the family's prefix.
    """
    left = dict.fromkeys(name for name in ours if not name.startswith(OURS_ALONE))
    layers = len({name.split(".")[1] for name in left if name.startswith("layers.")})
    prefix = "" if bare else which.prefix
    tensors = []
    for module, parts in which.modules.items():
        for number in map(str, range(layers if "*" in module else 1)):
            for kind in ("weight", "bias"):
                names = tuple(f"{part.replace('*', number)}.{kind}" for part in parts)
                if not all(name in left for name in names):
                    continue
                for name in names:
                    del left[name]
                pattern = f"{prefix}{module}.{kind}"
                turned = which.transposed and "*" in module and kind == "weight"
                tensors.append(Stored(pattern.replace("*", number), names, turned, pattern))
    if "head.weight" in left:
        del left["head.weight"]
        tensors.append(Stored(HEAD, ("head.weight",), False, HEAD))
    assert not left, f"{which.name} has no names for {sorted(left)}"
    return tensors
