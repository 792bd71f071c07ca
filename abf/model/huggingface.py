"""Hugging Face model directories, read and written: Llama, SmolLM, Mistral, Qwen and GPT-2.

A directory holds `config.json` and `model.safetensors` (or shards with an index). Pickled weights
are never read and no code comes from a directory. Reading needs no `transformers`, which stays an
independent oracle. What this reader does not know is refused by name: a silently ignored bias would
be another model. The families' names are in `families/`, config.json in `hf_config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from abf.errors import ArtifactError
from abf.files import write_json
from abf.model.families.base import HEAD, OURS_ALONE, Family, Stored, family, stored
from abf.model.hf_config import CONFIG, Source, config_json, read_source
from abf.model.store import (
    WEIGHTS,
    assemble,
    empty_model,
    load_weights,
    read_json,
    save_weights,
)
from abf.model.transformer import Transformer

INDEX = "model.safetensors.index.json"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MAX_SHARD_BYTES = 5_000_000_000
"""Largest safetensors file that is written; a single larger tensor makes a larger file."""


def load_hf(directory: Path, *, max_block: int = 64, document_id: int | None = None) -> Transformer:
    """Read a Hugging Face directory as our model; MASK is the mean embedding, lengths uniform.

    Args:
        directory: config.json and safetensors.
        max_block: S, for the length head.
        document_id: as in `read_config`.

    Raises:
        ArtifactError: see `read_config`; or a tensor is missing, unknown, there twice or of another
            shape.
    """
    source = read_source(directory, max_block=max_block, document_id=document_id)
    found: dict[str, Tensor] = {}
    for file in weight_files(directory):
        part = load_weights(file)
        if twice := sorted(found.keys() & part.keys()):
            raise ArtifactError(f"{file} holds tensor {twice[0]}, as another shard does")
        found |= part
    for name in _redundant(source, found):
        if name == HEAD and not _same_head(source.family, found):
            raise ArtifactError(
                f"{directory}: tie_word_embeddings is true but {HEAD} differs from the embedding"
            )
        del found[name]
    empty = empty_model(source.config).state_dict()
    tensors = {one.name: one for one in _expected(source.family, empty, found)}
    weights: dict[str, Tensor] = {}
    for name in sorted(tensors.keys() | found.keys()):
        if name not in found:
            raise ArtifactError(
                f"{directory} lacks tensor {name}: a shard is missing, or its {CONFIG} is another "
                "checkpoint's; copy the checkpoint again"
            )
        if name not in tensors:
            raise ArtifactError(
                f"{directory} holds tensor {name}, which {source.family.architecture} as described "
                f"by its {CONFIG} has not: give the {CONFIG} that it was saved with, or save it "
                "again without adapters and other additions"
            )
        one, tensor = tensors[name], found.pop(name)
        sizes = [len(empty[ours]) for ours in one.ours]
        expected = [sum(sizes), *empty[one.ours[0]].shape[1:]]
        expected = expected[::-1] if one.transposed else expected
        if list(tensor.shape) != expected:
            raise ArtifactError(
                f"{directory}: tensor {name} has shape {list(tensor.shape)}, {CONFIG} says "
                f"{expected}"
            )
        if tensor.dtype not in _DTYPES:
            raise ArtifactError(
                f"{directory}: tensor {name} is {tensor.dtype}; only {_DTYPES} are read"
            )
        parts = (tensor.t() if one.transposed else tensor).split(sizes)
        weights |= {ours: part.contiguous() for ours, part in zip(one.ours, parts, strict=True)}
    for name, tensor in empty.items():
        if name.startswith(OURS_ALONE):
            weights[name] = torch.zeros(tensor.shape)
    model = assemble(source.config, weights, directory)
    model.reset_mask_embedding()
    return model


def describe(directory: Path, model: Transformer) -> Iterator[str]:
    """What `load_hf` mapped to make `model` of a directory, a line a group of tensors."""
    source = read_source(directory)
    config, state = model.config, model.state_dict()
    found = {name for file in weight_files(directory) for name in _tensor_names(file)}
    dropped = _redundant(source, found)
    tensors = _expected(source.family, state, found)
    size = sum(state[ours].numel() for one in tensors for ours in one.ours)
    yield (
        f"{directory}: {source.family.architecture}, {config.layers} layers, vocabulary "
        f"{config.vocab_size}, context {config.max_positions} ({source.limit}); {len(tensors)} "
        f"tensors mapped, {size} parameters"
    )
    groups: dict[str, list[Stored]] = {}
    for one in tensors:
        groups.setdefault(one.module, []).append(one)
    for module, members in groups.items():
        ours = [re.sub(r"^layers\.\d+", "layers.*", name) for name in members[0].ours]
        turned = members[0].transposed and state[members[0].ours[0]].dim() == 2
        how = ", transposed" if turned else ""
        yield f"  {module} -> {', '.join(ours)} ({len(members)}{how})"
    if dropped:
        yield f"  dropped, no weights of their own: {', '.join(sorted(dropped))}"
    new = (f"{name} {list(state[name].shape)}" for name in state if name.startswith(OURS_ALONE))
    yield f"  new: {', '.join(new)}"


def _expected(which: Family, ours: Collection[str], found: Collection[str]) -> list[Stored]:
    """The tensors of a directory that has `found`, with or without the family's prefix."""
    bare = not any(name.startswith(which.prefix) for name in found)
    return stored(which, ours, bare=bare)


def _redundant(source: Source, found: Collection[str]) -> list[str]:
    """What older checkpoints store beside their weights: masks, rotary tables, the tied head."""
    names = [name for name in found if re.fullmatch(source.family.redundant, name)]
    return names + [HEAD] * (source.config.tie_embeddings and HEAD in found)


def _same_head(which: Family, found: dict[str, Tensor]) -> bool:
    """Whether a tied head that is stored all the same is the embedding, if that is stored."""
    (embedding,) = (one.name for one in _expected(which, ("embedding.weight",), found))
    return embedding not in found or torch.equal(found[HEAD], found[embedding])


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


def save_hf(model: Transformer, directory: Path, *, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Write the AR view of a model as a directory of its family, loadable by `transformers`.

    The MASK embedding and the heads of ours have no place there and are left out. What is larger
    than `max_shard_bytes` goes into several files and an index.
    """
    directory.mkdir(parents=True, exist_ok=True)
    state = model.state_dict()
    shards: list[dict[str, Tensor]] = [{}]
    size = 0
    for one in stored(family(model.config.family), state):
        parts = [state[name] for name in one.ours]
        tensor = torch.cat(parts) if len(parts) > 1 else parts[0]
        size += tensor.nbytes
        if size > max_shard_bytes and shards[-1]:
            shards.append({})
            size = tensor.nbytes
        shards[-1][one.name] = tensor.t() if one.transposed else tensor
    write_json(directory / CONFIG, config_json(model.config))
    if len(shards) == 1:
        save_weights(shards[0], directory / WEIGHTS)
        return
    where = {}
    for number, shard in enumerate(shards, start=1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_weights(shard, directory / file)
        where |= dict.fromkeys(shard, file)
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": where})
