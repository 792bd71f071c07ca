"""One contract for every strategy and every extent policy, found by the kinds of the config."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest

from abf.base import ConfigModel, build
from abf.checked import members
from abf.decode.config import Extent, SamplerConfig, Strategy
from abf.decode.replay import replay
from abf.decode.trace import read_trace
from abf.eval.flops import passes_from_log
from abf.model.transformer import Transformer
from tests.decode.tiny import V, tiny_decode, tiny_engine, tiny_prompts

NEEDED = {"fixed": {"length": 5}, "path": {"steps": 8}, "earlier": {"back": 1}}
"""Settings without a default, or with one that takes long."""


def every(union: object) -> list[ConfigModel]:
    return [m(**NEEDED.get(m.model_fields["kind"].default, {})) for m in members(union)]


def kind(cfg: ConfigModel) -> str:
    return cfg.model_dump()["kind"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("strategy", "extent"),
    [
        pair
        for pair in product(every(Strategy), every(Extent))
        if kind(pair[1]) != "earlier" or kind(pair[0]) == "abf"  # others are refused
    ],
    ids=lambda cfg: kind(cfg),
)
def test_contract(
    strategy: ConfigModel,
    extent: ConfigModel,
    temperature: float,
    model: Transformer,
    editor: Transformer,
    tmp_path: Path,
) -> None:
    built = build(strategy, room="abf.decode.strategy")
    opened = build(extent, room="abf.decode.extent")
    engine = tiny_engine(
        editor if built.needs_edits else model,
        built,
        extent=opened,
        sampler=SamplerConfig(temperature=temperature),
    )
    prompts = tiny_prompts(3 if built.needs_edits else 6)[opened.back :]
    samples = tiny_decode(tmp_path / "log", engine, prompts)
    again = tiny_decode(tmp_path / "again", engine, prompts)
    _, events, complete = read_trace(tmp_path / "log")
    log = events.to_pylist()
    passes = passes_from_log(events, ends=built.needs_edits)
    assert complete
    assert replay(tmp_path / "log") == {s.request: s.token_ids.tolist() for s in samples}
    for sample, same, prompt in zip(samples, again, prompts, strict=True):
        assert sample.token_ids.tolist() == same.token_ids.tolist()
        assert sample.prompt_ids.tolist() == prompt.token_ids.tolist()
        assert ((sample.token_ids < V) & (sample.token_ids >= 0)).all()
        assert 1 <= len(sample.token_ids) <= 30
        assert sample.finished == (sample.token_ids[-1] == 0)
        assert sample.finished or len(sample.token_ids) == 30
        counted = passes[sample.request]
        assert (counted.nfe, counted.positions) == (sample.nfe, sample.positions)
        mine = [e for e in log if e["request"] == sample.request]
        delivered = sum(e["length"] for e in mine if e["type"].endswith("COMPLETE"))
        assert delivered == len(sample.token_ids)
        commits = [e["uid"] for e in mine if e["type"] == "COMMIT"]
        assert len(commits) == len(set(commits)), "every slot is committed once"
        assert mine[-1]["type"] == "END"
        assert mine[-1]["nfe"] == sample.nfe
        assert np.diff([e["nfe"] for e in mine]).min() >= 0
