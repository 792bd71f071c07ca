"""Short decodes of the tiny model under a decoder config."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from abf.decode.config import ArStrategy, DecoderConfig, FixedExtent, ThresholdStrategy
from abf.decode.request import Prompt, Sample
from abf.decode.task import decode
from abf.decode.trace import TraceWriter
from abf.model.transformer import Transformer
from tests.decode.tiny import header

AR = DecoderConfig(strategy=ArStrategy(), precision="fp32")


def block_config(threshold: float, **changes: Any) -> DecoderConfig:
    settings: dict[str, Any] = {"extent": FixedExtent(length=6), "precision": "fp32"}
    return DecoderConfig(strategy=ThresholdStrategy(threshold=threshold), **(settings | changes))


def run(
    path: Path, cfg: DecoderConfig, model: Transformer, prompts: list[Prompt], **changes: Any
) -> list[Sample]:
    settings: dict[str, Any] = {"shift": True, "new_tokens": 30, "seed": 0}
    with TraceWriter(path, header(len(prompts))) as trace:
        return decode(cfg, model=model, prompts=prompts, trace=trace, **(settings | changes))


def tokens(samples: list[Sample]) -> list[list[int]]:
    return [sample.token_ids.tolist() for sample in samples]
