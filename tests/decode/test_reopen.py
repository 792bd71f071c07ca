"""Blocks that are opened a second time where their AR audit is too low."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from abf.decode.replay import replay
from abf.decode.strategy.abf import Abf
from abf.decode.trace import read_trace
from abf.model.transformer import Transformer
from tests.decode.test_abf import CONFIGS
from tests.decode.tiny import tiny_decode, tiny_engine, tiny_prompts

BAR = -3.0


@pytest.fixture(scope="module")
def reopened_log(editor: Transformer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    path = tmp_path_factory.mktemp("reopen") / "log"
    engine = tiny_engine(editor, Abf(CONFIGS["grows"]), reopen=BAR)
    samples = tiny_decode(path, engine, tiny_prompts())
    _, events, _ = read_trace(path)
    return path, samples, events.to_pylist()


def test_a_reopened_log_gives_the_text(reopened_log: Any) -> None:
    path, samples, _ = reopened_log
    assert replay(path) == {s.request: s.token_ids.tolist() for s in samples}


def test_a_block_is_reopened_once_where_its_mean_is_below_the_bar(reopened_log: Any) -> None:
    """Delivered blocks lie above the bar, or were opened twice."""
    _, samples, events = reopened_log
    reopened = [(e["request"], e["block"]) for e in events if e["type"] == "REOPEN"]
    assert len(reopened) == len(set(reopened)) == sum(s.reopened_blocks for s in samples) > 0
    blocks = 0
    for sample in samples:
        edges = np.cumsum([0, *sample.block_length])
        for block, (a, b) in enumerate(itertools.pairwise(edges)):
            kept = (sample.request, block) not in reopened
            blocks += kept
            assert not kept or sample.log_probs[a:b].mean() >= BAR
    assert blocks > 0, "some pass their audit at once"


def test_masks_take_the_place_of_what_the_ar_model_finds_unlikely(reopened_log: Any) -> None:
    _, _, events = reopened_log
    for at, event in enumerate(events):
        if event["type"] != "REOPEN":
            continue
        group = []
        for later in events[at + 1 :]:
            if (later["request"], later["step"]) != (event["request"], event["step"]):
                break
            group.append(later)
        deleted = [e for e in group if e["type"] == "DELETE"]
        assert 1 <= len(deleted) == sum(e["type"] == "INSERT" for e in group)
        assert all(e["gate"] < np.exp(BAR) + 1e-6 for e in deleted)
        assert event["prob"] < event["threshold"] == pytest.approx(np.exp(BAR))
