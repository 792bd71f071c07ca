"""One request driven without a model: proposals and gates are drawn, or functions of the text.

V vocabulary; the document token is 0, MASK is V.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from abf.decode.decide import step
from abf.decode.observe import Limits, block_view
from abf.decode.request import Prompt, RequestState
from abf.decode.sampler import Proposals
from abf.decode.trace import TraceWriter, read_trace
from abf.decode.view import Action, BlockSummary, BlockView, RequestMeta
from abf.model.transformer import EDITS
from tests.decode.tiny import header

V = 97


class Scripted:
    """Acts by a function of the view."""

    needs_edits, timed = True, False

    def __init__(self, act: Callable[[BlockView], Action], *, timed: bool = False) -> None:
        self.act, self.timed = act, timed

    def start(self, meta: RequestMeta) -> None:
        """No state."""

    def decide(self, view: BlockView, state: Any) -> Action:
        """The function's."""
        return self.act(view)

    def end_block(self, summary: BlockSummary, state: Any) -> None:
        """Nothing to forget."""


class Driver:
    """A request and its log."""

    def __init__(
        self, path: Path, *, new_tokens: int = 20, limits: Limits | None = None, seed: int = 0
    ) -> None:
        self.path, self.limits = path, limits or Limits(50, 12, 3)
        self.trace = TraceWriter(path, header(1))
        prompt = Prompt(0, "0", np.array([5, 6], dtype=np.int64))
        self.state = RequestState(prompt, new_tokens, V, 0, self.trace)
        self.state.context()
        self.rng = np.random.default_rng(seed)

    @property
    def ids(self) -> list[int]:
        """Of the open block."""
        assert self.state.block is not None
        return self.state.block.ids.tolist()

    def step(self, strategy: Scripted) -> None:
        """One decision on drawn numbers that depend on the text alone."""
        block = self.state.block
        assert block is not None
        n = block.live
        rng = np.random.default_rng([1, *block.ids[:n].tolist()])
        top = np.stack([rng.permutation(V)[:4] for _ in range(n)]) if n else np.zeros((0, 4), int)
        probs = -np.sort(-rng.dirichlet(np.ones(5), n)[:, :4], axis=1)
        proposals = Proposals(
            top[:, 0].astype(np.int32), probs[:, 0].astype(np.float32),
            rng.random(n).astype(np.float32), top.astype(np.int32), probs.astype(np.float32),
        )  # fmt: skip
        edits = torch.from_numpy(rng.normal(size=(n + 1, len(EDITS))).astype(np.float32))
        view = block_view(
            self.state, np.arange(n), proposals, limits=self.limits, edits=edits,
            uniforms=self.rng.random((n + 1, 3)), timed=strategy.timed,
        )  # fmt: skip
        self.state.nfe += 1
        step(self.state, view, strategy)

    def block(self, strategy: Scripted, length: int, *, reopen: bool = False) -> int:
        """Open a block, decide until it is closed, write it; how many decisions it took."""
        self.state.open(min(length, self.state.tokens_left))
        count = 0
        while True:
            while self.state.block is not None:
                self.step(strategy)
                count += 1
            self.state.nfe += 1
            closing = self.state.closing
            assert closing is not None
            log_probs = -self.rng.exponential(size=closing.live)
            bad = log_probs < -1.0
            if not (reopen and bad.any() and not closing.reopened):
                self.state.written(log_probs)
                return count
            self.state.reopen(bad, log_probs, -1.0)

    def events(self) -> list[dict[str, Any]]:
        """What was logged so far."""
        self.trace.flush()
        return read_trace(self.path)[1].to_pylist()
