"""Inputs that are new in every run; the seed is printed where a test fails."""

from __future__ import annotations

import itertools

import numpy as np
import torch

SEEDS = itertools.count(np.random.SeedSequence().generate_state(1).item())


def fresh(seed: int | None = None) -> torch.Generator:
    """A generator of this seed, or of one that no run had before."""
    seed = next(SEEDS) if seed is None else seed
    print(f"{seed=}")
    return torch.Generator().manual_seed(seed)
