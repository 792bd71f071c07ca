"""What every room shares: the strict config model, and building a variant from its config.

A variant (segmenter, corruption, strategy, task ...) is one file named after its `kind`, with its
config class in the room's torch-free `config.py`. There is no registry: the file name is it.
"""

from __future__ import annotations

import importlib
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

SEEDS = 2**31
Seed = Annotated[int, Field(ge=0, lt=SEEDS)]
"""Seed of random numbers; tables hold it as int32."""
Threads = Annotated[int, Field(ge=1, le=256)]
"""CPU threads of one job; the largest nodes have this many cores."""


class ConfigModel(BaseModel):
    """Immutable settings; a misspelt key is an error. `abf.checked.validate` reads strictly."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        validate_default=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )


def build(cfg: ConfigModel, *, room: str | None = None, **context: Any) -> Any:
    """Import the module named by `cfg.kind` and return its `build(cfg, **context)`.

    Args:
        cfg: a config with a `kind` field.
        room: package that holds the variants; default is the package of the config's class.
        context: what the variant needs beside its config (paths, a model ...).
    """
    kind = cfg.model_dump(include={"kind"})["kind"]
    package = room or type(cfg).__module__.rpartition(".")[0]
    return importlib.import_module(f"{package}.{kind}").build(cfg, **context)
