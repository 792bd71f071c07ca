"""Sample the process that the bound is about, on a grid of times (tau-leaping).

At each step the rates of the text at that time hold for one interval of tau: every mask rings with
its rate 1 and is filled from (1-p_u) p + p_u/V, every group of gaps gets a Poisson number of masks,
every token is looked at anew at its rate. Only as the grid gets finer is this the process itself,
whose text has the probability that the bound bounds (docs/method.md); the number of masks to begin
with is the length head's, none included. What is left at the end of the grid is filled at once, and
the block counts as forced.

Letters: n slots of the block.
"""

from __future__ import annotations

import math

import numpy as np
import torch

from abf.decode.config import PathStrategy
from abf.decode.view import Action, BlockSummary, BlockView, Gaps, RequestMeta, Tokens, pooled
from abf.diffusion.path.bound import insert_rate, substitute_rate
from abf.diffusion.path.law import PathLaw


class Path:
    """Stateless: a block's step number is its place on the grid."""

    needs_edits = timed = True

    def __init__(self, cfg: PathStrategy) -> None:
        self.cfg = cfg
        self.leap = cfg.tau_max / cfg.steps

    def start(self, meta: RequestMeta) -> None:
        """No state."""

    def decide(self, view: BlockView, state: None) -> Action:
        """What happens in one interval of tau."""
        cfg, edit, n = self.cfg, view.edit, len(view.ids)
        assert edit is not None
        if view.step >= cfg.steps:
            return Action(complete=True)
        event, choice, arrival = edit.uniforms.T
        law = PathLaw(cfg.late, cfg.wrong, vocab=view.mask_id)
        # Rates move with tau even where the text does not: those of the middle lose least.
        tau = torch.tensor((view.step + 0.5) * self.leap, dtype=torch.float64)
        raw = torch.tensor(edit.raw, dtype=torch.float64)

        rings = view.is_mask & (event[:n] < -math.expm1(-self.leap))
        anywhere = choice[:n] < cfg.wrong
        uniform = np.floor(choice[:n] / max(cfg.wrong, 1e-300) * view.mask_id)
        tokens = np.where(anywhere, uniform.clip(max=view.mask_id - 1), view.token).astype(np.int32)

        rate = substitute_rate(raw[:n, 2], law, law.statuses(tau)).numpy()
        looks = ~view.is_mask & (event[:n] < -np.expm1(-rate * self.leap))
        looks &= view.token != view.ids

        rates = insert_rate(raw[:, 0], raw[:, 1], tau).numpy()
        total = pooled(rates, view.is_mask)
        first = np.concatenate([[True], ~view.is_mask])  # the gap that stands for its group
        counts = np.where(first, poisson(total * self.leap, arrival), 0).clip(max=edit.room)
        gaps = np.flatnonzero(counts)
        last = view.step == cfg.steps - 1 and n > 0
        return Action(
            fill=Tokens(view.uids[rings], tokens[rings]),
            substitute=Tokens(view.uids[looks], view.token[looks]),
            insert=Gaps(edit.gap_uids[gaps], counts[gaps]),
            complete=bool(last and rings.sum() == view.is_mask.sum() and not len(gaps)),
        )

    def end_block(self, summary: BlockSummary, state: None) -> None:
        """Nothing to forget."""


def poisson(mean: np.ndarray, uniforms: np.ndarray) -> np.ndarray:
    """Poisson numbers by inversion, up to 63."""
    k = np.arange(64)
    with np.errstate(divide="ignore", invalid="ignore"):
        logs = np.where(k > 0, k * np.log(mean[:, None]), 0.0)
    factorials = np.array([math.lgamma(j + 1) for j in k])
    below = np.exp(logs - factorials - mean[:, None]).cumsum(axis=1)
    return (uniforms[:, None] >= below).sum(axis=1).clip(max=63)


def build(cfg: PathStrategy) -> Path:
    """The strategy of its config."""
    return Path(cfg)
