"""Which device a process computes on."""

from __future__ import annotations

import os
from typing import Literal

import torch

from abf.errors import ConfigError

CPU = torch.device("cpu")


def own_device(kind: Literal["auto", "cpu", "cuda"] = "auto") -> torch.device:
    """The device of this rank: its GPU, if it is to have one and sees one.

    Ranks of a node take the GPUs they see in turn (LOCAL_RANK, as torchrun sets it, or
    SLURM_LOCALID); a rank to which Slurm shows a single one takes that.

    Raises:
        ConfigError: `cuda` is asked for and there is none.
    """
    seen = torch.cuda.device_count() if kind != "cpu" else 0
    if kind == "cuda" and not seen:
        raise ConfigError(
            "train.device is 'cuda', but this process sees no GPU: ask for one, install the CUDA "
            "build of torch (envs/cuda.txt), or set train.device to 'auto' or 'cpu'"
        )
    if not seen:
        return CPU
    local = os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0"))
    return torch.device("cuda", int(local) % seen)
