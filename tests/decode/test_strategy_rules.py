"""What the engine grants a decode strategy, and the rules it holds it to."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from abf.decode.strategy.threshold import Threshold
from abf.decode.trace import read_trace
from abf.decode.view import Action, BlockSummary, BlockView, RequestMeta, Tokens
from abf.model.transformer import Transformer
from tests.decode.runs import tokens
from tests.decode.tiny import V, tiny_decode, tiny_engine, tiny_prompts


class Lazy:
    """Never commits anything."""

    needs_edits = timed = False

    def start(self, meta: RequestMeta) -> Any:
        pass

    def decide(self, view: BlockView, state: Any) -> Action:
        return Action(commit=Tokens(view.uids[:0], view.token[:0]))

    def end_block(self, summary: BlockSummary, state: Any) -> None:
        pass


def test_a_lazy_strategy_still_makes_progress(model: Transformer, tmp_path: Path) -> None:
    lazy, one = (
        tiny_decode(tmp_path / "log", tiny_engine(model, strategy), tiny_prompts())
        for strategy in (Lazy(), Threshold(1.1))
    )
    assert tokens(lazy) == tokens(one)


def test_step_cap_commits_everything_and_says_so(model: Transformer, tmp_path: Path) -> None:
    engine = tiny_engine(model, Lazy(), max_steps=2)
    samples = tiny_decode(tmp_path / "log", engine, tiny_prompts())
    _, events, complete = read_trace(tmp_path / "log")
    kinds = Counter(events["type"].to_pylist())
    assert complete
    assert kinds["FORCED_COMPLETE"] == sum(s.forced_blocks for s in samples) > 0
    assert max(events["step"].to_pylist()) == 2
    unforced = tiny_decode(tmp_path / "log", tiny_engine(model, Threshold(0.0)), tiny_prompts())
    assert sum(s.forced_blocks for s in unforced) == 0


class Closing(Lazy):
    """Commits the document token at the third slot first, then the rest one by one."""

    def decide(self, view: BlockView, state: Any) -> Action:
        if view.step == 0:
            return Action(commit=Tokens(view.uids[2:3], np.array([view.document_id])))
        assert len(view.ids) == 3, "slots behind the document token are out of the game"
        return super().decide(view, state)


def test_what_stands_behind_the_document_token_is_dropped(
    model: Transformer, tmp_path: Path
) -> None:
    for sample in tiny_decode(tmp_path / "log", tiny_engine(model, Closing()), tiny_prompts()):
        assert sample.finished
        assert sample.token_ids[-1] == 0
        assert 0 not in sample.token_ids[:-1]
        assert len(sample.token_ids) + sample.dropped == 6


def test_a_text_that_ends_at_the_step_cap_is_not_forced(model: Transformer, tmp_path: Path) -> None:
    """What is left behind the document token does not count."""

    class Ending(Lazy):
        def decide(self, view: BlockView, state: Any) -> Action:
            tokens = view.token[:3].copy()
            tokens[2] = view.document_id
            return Action(commit=Tokens(view.uids[:3], tokens))

    engine = tiny_engine(model, Ending(), max_steps=1)
    for sample in tiny_decode(tmp_path / "log", engine, tiny_prompts()):
        assert sample.finished
        assert sample.forced_blocks == 0


class Remembering(Lazy):
    """State is the list of views' blocks; each request must find its own."""

    def start(self, meta: RequestMeta) -> dict[str, Any]:
        return {"request": meta.request, "blocks": []}

    def decide(self, view: BlockView, state: Any) -> Action:
        assert state["request"] == view.request
        assert len(state["blocks"]) == view.block
        chosen = view.is_mask & (view.confidence >= view.request / 10)
        return Action(commit=Tokens(view.uids[chosen], view.token[chosen]))

    def end_block(self, summary: BlockSummary, state: Any) -> None:
        state["blocks"].append(summary.kept)


def test_strategy_state_belongs_to_the_request(model: Transformer, tmp_path: Path) -> None:
    prompts = tiny_prompts()
    together = tiny_decode(tmp_path / "log", tiny_engine(model, Remembering()), prompts)
    for prompt, sample in zip(prompts, together, strict=True):
        (alone,) = tiny_decode(tmp_path / "one", tiny_engine(model, Remembering()), [prompt])
        assert alone.token_ids.tolist() == sample.token_ids.tolist()


def test_views_are_read_only(model: Transformer, tmp_path: Path) -> None:
    class Vandal(Lazy):
        def decide(self, view: BlockView, state: Any) -> Action:
            for array in (v for v in vars(view).values() if isinstance(v, np.ndarray)):
                with pytest.raises(ValueError, match="read-only"):
                    array[...] = 0
            return super().decide(view, state)

    tiny_decode(tmp_path / "log", tiny_engine(model, Vandal()), tiny_prompts(2), new_tokens=6)


@pytest.mark.parametrize(
    ("commit", "message"),
    [
        (lambda view: Tokens(view.uids[:1], np.array([V])), "emits"),
        (lambda view: Tokens(view.uids[[0, 0]], view.token[[0, 0]]), "twice"),
        (lambda view: Tokens(view.uids[:1] - 1, view.token[:1]), "not in the view"),
    ],
)
def test_a_strategy_that_breaks_the_rules_is_named(
    model: Transformer, tmp_path: Path, commit: Any, message: str
) -> None:
    class Rogue(Lazy):
        def decide(self, view: BlockView, state: Any) -> Action:
            return Action(commit=commit(view))

    with pytest.raises(AssertionError, match=f"Rogue.*{message}"):
        tiny_decode(tmp_path / "log", tiny_engine(model, Rogue()), tiny_prompts(2))
