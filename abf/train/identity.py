"""What a run is: a checkpoint goes on only in the run that wrote it, or where the user says so."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from abf.errors import ResumeError
from abf.train.checkpoint import Checkpoint
from abf.train.config import TrainConfig
from abf.train.runtime import differences

SAMPLE_BYTES = 1 << 20
"""Bytes at either end of the packed file that enter its fingerprint."""


SAME_RESULT = {
    "device",
    "parallel",
    "checkpoint_activations",
    "checkpoint_steps",
    "keep_checkpoints",
}
"""Settings that a resumed run may have other values of: they change no result."""


def identity_of(
    cfg: TrainConfig, *, seed: int, model: torch.nn.Module, packed: Path
) -> dict[str, Any]:
    """Everything that a run's result follows from."""
    return {
        "config": cfg.model_dump(mode="json", exclude=SAME_RESULT),
        "seed": seed,
        "initial_model": model_hash(model),
        "packed": _fingerprint(packed),
    }


def check_identity(
    found: Checkpoint, identity: Mapping[str, Any], accept: Collection[str]
) -> list[str]:
    """What has changed since a checkpoint and was accepted, a phrase each.

    Args:
    found: the checkpoint.
    identity: what the run is now.
    accept: keys that may have changed.

    Raises:
    ResumeError: something else has; or a key is accepted that there is not.
    """
    before, now = _flat(found.state["identity"]), _flat(identity)
    changed = differences(before, now)
    names = [phrase.partition(":")[0] for phrase in changed]
    refused = [one for one, name in zip(changed, names, strict=True) if name not in accept]
    if refused:
        raise ResumeError(
            f"{found.path} belongs to another run; different (checkpoint -> now): "
            f"{'; '.join(refused)}. Restore these, accept each by `--accept KEY` to go on "
            f"with it all the same, or delete {found.path.parent} to train from scratch"
        )
    if unknown := sorted(set(accept) - set(before) - set(now)):
        raise ResumeError(
            f"--accept {unknown[0]}: {found.path} has no such key; what differs: "
            f"{', '.join(names) or 'nothing'}"
        )
    return changed


def model_hash(model: torch.nn.Module) -> str:
    """Hash of all parameters, names and shapes."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}\n".encode())
        digest.update(parameter.detach().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _fingerprint(path: Path) -> dict[str, Any]:
    """Size of a file and hash of both its ends: cheap on terabytes, and tells data sets apart."""
    size = path.stat().st_size
    with open(path, "rb") as handle:
        digest = hashlib.sha256(handle.read(SAMPLE_BYTES))
        handle.seek(max(0, size - SAMPLE_BYTES))
        digest.update(handle.read())
    return {"bytes": size, "ends_sha256": digest.hexdigest()}


def _flat(value: Any, prefix: str = "") -> dict[str, str]:
    """Nested JSON as dotted keys with their values' text."""
    if not isinstance(value, Mapping):
        return {prefix: str(value)}
    return {
        key: text
        for name, part in value.items()
        for key, text in _flat(part, f"{prefix}.{name}" if prefix else name).items()
    }
