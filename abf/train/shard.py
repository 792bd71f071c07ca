"""Weights, gradients and optimiser state in shards over ranks: FSDP2 (`fully_shard`) on a mesh.

Every rank computes on its own rows; a layer's weights are gathered when it is reached and given up
after it. One module around model and loss is the root, so that whatever a loss reads is gathered.
Ranks must meet in the same collectives in the same order: each does the same number of passes, and
every weight enters each loss (notes/feasibility.md §3).
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from abf.errors import ConfigError
from abf.model.rope import rope_frequencies
from abf.model.store import empty_model
from abf.model.transformer import Transformer
from abf.train.optim import Optimiser
from abf.train.parallel import World

RANKS_PER_NODE = "LOCAL_WORLD_SIZE"
"""Environment variable, as torchrun sets it; without it all ranks count as one node's."""


def shard(
    root: nn.Module, model: Transformer, world: World, strategy: Literal["full", "hybrid"]
) -> None:
    """Turn the weights below `root` into shards, in place.

    Args:
        root: the module whose forward pass every rank calls; holds `model`.
        model: its layers are gathered one by one, the rest with the root.
        world: more than one rank.
        strategy: shards over all ranks, or over those of a node.

    Raises:
        ConfigError: the ranks cannot be laid out in nodes of equal size.
    """
    mesh = _mesh(world, strategy)
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(root, mesh=mesh)


def _mesh(world: World, strategy: Literal["full", "hybrid"]) -> DeviceMesh:
    if strategy == "full":
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shard",))
    local = int(os.environ.get(RANKS_PER_NODE, world.size))
    if any(other != local for other in world.gather(local)) or world.size % local:
        raise ConfigError(
            f"train.parallel.sharding is 'hybrid', but {world.size} ranks are not nodes of equal "
            f"size (rank {world.rank} has {RANKS_PER_NODE}={local}): use 'full', or as many ranks "
            "on every node"
        )
    names = ("replicate", "shard")
    shape = (world.size // local, local)
    mesh = init_device_mesh(world.device.type, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():  # they do not inherit it
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=world.timeout_s), group)
    return mesh


class ShardedOptimiser(Optimiser):
    """AdamW on shards: each rank updates its own; FSDP2 sums the gradients during backward."""

    def _hold_gradients(self) -> None:
        """They come from FSDP2, anew in every step."""

    def zero_grad(self) -> None:
        """Forget the gradients of the last step."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def sum_gradients(self, world: World) -> None:
        """Nothing to do: they were summed shard by shard."""
        missing = [name for name, p in self.parameters.items() if p.grad is None]
        assert not missing, f"no gradient reached {missing}"

    def clip(self) -> float:
        """Scale the gradients to at most `clip_norm`; returns the norm before (may be inf, NaN)."""
        gradients = [p.grad for p in self.parameters.values() if p.grad is not None]
        norm = whole(torch.nn.utils.get_total_norm(gradients))
        scale = self.cfg.clip_norm / norm
        if scale < 1:
            for gradient in gradients:
                gradient.mul_(scale)
        return float(norm)


class _Enter(torch.autograd.Function):
    """Identity on a loss; a gradient of zeros for every weight it is shown."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, *weights: Tensor) -> Tensor:
        ctx.like = [(weight.shape, weight.dtype, weight.device) for weight in weights]
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        zeros = [torch.zeros((), dtype=d, device=at).expand(shape) for shape, d, at in ctx.like]
        return (*grads, *zeros)


def enter(loss: Tensor, model: Transformer) -> Tensor:
    """The same loss, which every weight outside the layers now takes part in.

    A head that some rank's rows do not reach would otherwise have a gradient on the others alone,
    and they would wait for it in a collective. Layers are always reached.
    """
    apart = [p for name, p in model.named_parameters() if not name.startswith("layers.")]
    return _Enter.apply(loss, *apart)


def whole(tensor: Tensor) -> Tensor:
    """A tensor gathered from its shards, on every rank; itself when it is not sharded."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(model: Transformer) -> Transformer:
    """A plain model with the weights of a sharded one, on every rank; itself when it is plain."""
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        return model
    plain = empty_model(model.config).to_empty(device="cpu")
    plain.rope = rope_frequencies(model.config)
    with torch.no_grad():
        for (_, target), (_, source) in zip(
            plain.named_parameters(), model.named_parameters(), strict=True
        ):
            target.copy_(whole(source.detach()))
    return plain
