"""The decode stage: prompts from held-out text, one decoder, samples and event log.

Writes `samples.parquet` (SAMPLES) and `trace.arrows` (EVENTS). Seconds are wall-clock.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import pyarrow as pa
import torch

from abf.artifacts import SAMPLES, write_table
from abf.base import build
from abf.data.tokenizer import TextTokenizer, load_tokenizer
from abf.decode.config import DecoderConfig, FixedExtent
from abf.decode.controls import NO_CONTROLS, Controls, controls
from abf.decode.engine import Engine
from abf.decode.prompts import PromptTask, check_prompts, held_out_prompts
from abf.decode.request import Prompt, Sample
from abf.decode.trace import TraceWriter
from abf.errors import ConfigError
from abf.files import sha256
from abf.model.attention import check_backend
from abf.model.device import own_device
from abf.model.store import WEIGHTS, load_model
from abf.model.transformer import Transformer
from abf.track.meter import EnergyMeter
from abf.track.progress import Progress


def decode_task(
    task: PromptTask,
    decoder: DecoderConfig,
    *,
    shift: bool,
    seed: int,
    model_dir: Path,
    packed: Path,
    tokenizer: Path,
    out: Path,
    clean_stream: Literal["context_causal", "block_causal"] = "context_causal",
    label: str = "decode",
) -> dict[str, int | float | str]:
    """Generate for one task with one decoder.

    Args:
        task: how many prompts, how long, how much to generate.
        decoder: strategy, extent, sampler; `precision` resolved.
        shift: read-out of the model that was trained.
        seed: of everything random.
        model_dir: ABF model directory.
        packed: stage directory of `pack`.
        tokenizer: folder with tokenizer.json.
        out: staging directory.
        clean_stream: what the model's clean stream was trained on.
        label: name on the progress line.

    Returns:
        Counts for the manifest; `joules` only if a meter was read.

    Raises:
        ConfigError: fewer long enough held-out documents than prompts, or unfit attention.
        ArtifactError: model and packed text have different vocabularies.
    """
    torch.set_num_threads(decoder.threads)
    model = load_model(model_dir).to(own_device()).eval()
    device = model.head_weight.device
    check_backend(decoder.attention, model.config, device=device, precision=decoder.precision)
    text = load_tokenizer(tokenizer)
    prompts = held_out_prompts(task, packed, model, text)
    asked = controls(decoder, text, max_block=model.max_block, new_tokens=task.new_tokens)
    header = {
        "version": "3",
        "mask_id": str(model.mask_id),
        "document_id": str(model.config.document_id),
        "requests": str(len(prompts)),
        "model_sha256": sha256(model_dir / WEIGHTS),
        "tokenizer_sha256": sha256(tokenizer / "tokenizer.json"),
        "decoder": json.dumps(decoder.model_dump(mode="json"), sort_keys=True),
        "forbidden": json.dumps(asked.forbidden),
        "keep": json.dumps(asked.keep),
        "new_tokens": str(task.new_tokens),
        "shift": str(shift).lower(),
        "clean_stream": clean_stream,
        "seed": str(seed),
        "dtype": decoder.precision,
        "device": str(device),
    }
    began = time.perf_counter()
    with (
        TraceWriter(out / "trace.arrows", header) as trace,
        EnergyMeter(device.type) as meter,
    ):
        samples = decode(
            decoder,
            model=model,
            shift=shift,
            prompts=prompts,
            new_tokens=task.new_tokens,
            seed=seed,
            trace=trace,
            clean_stream=clean_stream,
            label=label,
            controls=asked,
        )
    wall_s = time.perf_counter() - began
    write_table(out / "samples.parquet", samples_table(samples, text), SAMPLES)
    counts: dict[str, int | float | str] = {"wall_s": wall_s, "energy_source": meter.source}
    if meter.joules is not None:
        counts["joules"] = meter.joules
    return summary(samples, wall_s) | counts


def decode(
    cfg: DecoderConfig,
    *,
    model: Transformer,
    shift: bool,
    prompts: Sequence[Prompt],
    new_tokens: int,
    seed: int,
    trace: TraceWriter,
    clean_stream: Literal["context_causal", "block_causal"] = "context_causal",
    label: str = "decode",
    controls: Controls = NO_CONTROLS,
) -> list[Sample]:
    """Continue every prompt as the config says, `batch_size` side by side.

    Strategy `ar` is the same engine with blocks of one slot, read from the last committed token
    whatever `shift` says.

    Raises:
        ConfigError: the strategy needs edit heads and the model has none, or the AR view of a model
            whose clean stream saw ahead; the granularity is not one that the model was trained
            with; or a prompt and its new tokens are more than the model has positions.
    """
    if cfg.strategy.kind == "ar" and clean_stream == "block_causal":
        raise ConfigError(
            "strategy 'ar' reads the clean stream token by token, and this model's was trained "
            "with clean_stream 'block_causal', where a row sees its whole block: use another "
            "strategy, or a model trained with 'context_causal'"
        )
    strategy = build(cfg.strategy, room="abf.decode.strategy")
    if strategy.needs_edits and not model.config.edit_heads:
        raise ConfigError(
            f"strategy {cfg.strategy.kind!r} reads the heads of insertion, substitution, deletion "
            "and completion, and this model has none: decode a model trained with "
            "train.objective.corruption.kind `path`, or use another strategy"
        )
    known = model.config.granularities
    if cfg.granularity is not None and cfg.granularity not in known:
        raise ConfigError(
            f"granularity={cfg.granularity}: the training of this model told it "
            f"{f'of {list(known)} alone' if known else 'of no granularity'}, so it would not heed "
            "that; ask for what it knows, or for none"
        )
    engine = Engine(
        model,
        strategy=strategy,
        extent=build(cfg.extent or FixedExtent(length=1), room="abf.decode.extent"),
        sampler=cfg.sampler,
        shift=shift or cfg.extent is None,
        seed=seed,
        max_steps=cfg.max_steps_per_block,
        edits_per_slot=cfg.edits_per_slot,
        reopen=cfg.reopen,
        controls=controls,
        granularity=cfg.granularity,
        backend=cfg.attention,
        precision=cfg.precision,
        clean_stream=clean_stream,
    )
    # Those of the last batch as well, before the first one is decoded.
    check_prompts(prompts, new_tokens, config=model.config, back=engine.extent.back)
    samples: list[Sample] = []
    with Progress(label, len(prompts), unit="prompt") as progress:
        for start in range(0, len(prompts), cfg.batch_size):
            part = prompts[start : start + cfg.batch_size]
            samples += engine.run(part, new_tokens=new_tokens, trace=trace)
            progress.update(len(part), **telling(samples))
    return samples


def samples_table(samples: Sequence[Sample], tokenizer: TextTokenizer) -> pa.Table:
    """Samples as rows of the SAMPLES schema; text stops before the closing document token."""

    def text_of(sample: Sample) -> str:
        return tokenizer.decode(sample.token_ids[: len(sample.token_ids) - sample.finished])

    return pa.table(
        {
            "request": [s.request for s in samples],
            "prompt_id": [s.prompt_id for s in samples],
            "prompt": [tokenizer.decode(s.prompt_ids) for s in samples],
            "text": [text_of(s) for s in samples],
            "prompt_ids": [s.prompt_ids for s in samples],
            "token_ids": [s.token_ids for s in samples],
            "block_length": [s.block_length for s in samples],
            "nfe": [s.nfe for s in samples],
            "positions": [s.positions for s in samples],
            "finished": [s.finished for s in samples],
            "wall_s": [s.wall_s for s in samples],
        },
        schema=SAMPLES,
    )


def telling(samples: Sequence[Sample]) -> dict[str, float]:
    """What the progress line says: tokens a forward, and shares of blocks that did not end by
    themselves, if there are any."""
    blocks = sum(len(s.block_length) for s in samples)
    forced = sum(s.forced_blocks for s in samples) / blocks
    stalled = sum(s.stalled_blocks for s in samples) / blocks
    speed = sum(len(s.token_ids) for s in samples) / sum(s.nfe for s in samples)
    ends = {"forced_blocks": forced, "stalled_blocks": stalled}
    return {"tokens_per_forward": speed} | {name: share for name, share in ends.items() if share}


def summary(samples: Sequence[Sample], wall_s: float) -> dict[str, int | float | str]:
    """Totals over the requests."""
    tokens = sum(len(s.token_ids) for s in samples)
    nfe = sum(s.nfe for s in samples)
    blocks = sum(len(s.block_length) for s in samples)
    return {
        "requests": len(samples),
        "tokens": tokens,
        "nfe": nfe,
        "tpf": tokens / nfe,
        "positions": sum(s.positions for s in samples),
        "blocks": blocks,
        "dropped": sum(s.dropped for s in samples),
        "forced_share": sum(s.forced_blocks for s in samples) / blocks,
        "stalled_share": sum(s.stalled_blocks for s in samples) / blocks,
        "oscillating_share": sum(s.oscillating_blocks for s in samples) / blocks,
        "reopened_share": sum(s.reopened_blocks for s in samples) / blocks,
        **{
            f"{kind.lower()}s_per_token": sum(s.edits[kind] for s in samples) / tokens
            for kind in samples[0].edits
        },
        "finished_share": float(np.mean([s.finished for s in samples])),
        "tokens_per_s": tokens / wall_s,
    }
