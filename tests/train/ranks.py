"""Two processes of a test as the ranks of one world."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist


def join(rank: int, directory: Path, *, size: int = 2) -> None:
    """Meet the other rank in a file of this folder."""
    torch.set_num_threads(1)
    meeting = f"file://{directory / 'meeting'}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=size)
