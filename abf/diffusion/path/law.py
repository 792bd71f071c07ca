"""The conditional path of a block: how each token of the finished text comes about.

Clock: tau = -log u, from 0 (fresh block) to infinity; u is what remains of it. Each token of the
finished text y has a column, independent of the others: absent at 0 with probability p_D, else a
MASK; absent -> MASK at rate 1; MASK -> v at rate q(v) = (1-p_u) 1{v=y_i} + p_u/V; a wrong token ->
y_i at rate 1. What is seen is the text, the columns' contents without the absent ones.
Source: docs/method.md (after FlexMDM, arXiv 2509.01025, and GIDD, arXiv 2503.04482).

Letters: B blocks, n columns of the longest, V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ABSENT, MASKED, WRONG, CLEAN = range(4)
"""What a column holds."""


@dataclass(frozen=True)
class PathLaw:
    """p_D, p_u and V.

    Args:
        late: p_D, probability that a column is absent at the start.
        wrong: p_u, share of fills that draw a token uniformly.
        vocab: V.
    """

    late: float
    wrong: float
    vocab: int

    def statuses(self, tau: Tensor) -> Statuses:
        """Probabilities of what a column holds at times `tau`."""
        u = torch.exp(-tau)
        first = 1 - self.late
        absent = self.late * u
        masked = first * u + self.late * tau * u
        each = self.wrong / self.vocab * (first * tau + self.late * tau.square() / 2) * u
        return Statuses(absent, masked, each, 1 - absent - masked - (self.vocab - 1) * each)

    def fill_entropy(self) -> float:
        """H(q) in nats: entropy of what one fill brings, given the finished token."""
        hit = 1 - self.wrong + self.wrong / self.vocab
        miss = self.wrong / self.vocab
        rest = (self.vocab - 1) * miss * math.log(miss) if miss else 0.0
        return -hit * math.log(hit) - rest

    def length_nats(self, log_probs: Tensor, length: Tensor) -> Tensor:
        """KL in nats of the number of masks at the start from what the model says of it.

        The number is binomial, so its own entropy is taken off: -log P(length) alone would be
        looser, and no bound where that number is drawn.

        Args:
            log_probs: [B, N+1] log P(m0 | context) for m0 = 0..N.
            length: [B] tokens of the finished block, at most N.

        Returns:
            [B]
        """
        start = torch.arange(log_probs.shape[1], dtype=torch.float64, device=log_probs.device)
        n = length[:, None].double()
        missing = n - start
        possible = missing >= 0
        missing = missing.clamp(min=0)
        choose = torch.lgamma(n + 1) - torch.lgamma(start + 1) - torch.lgamma(missing + 1)
        log_law = choose + torch.xlogy(missing, self.late) + torch.xlogy(start, 1 - self.late)
        log_law = log_law.masked_fill(~possible, -torch.inf)
        law = log_law.exp()
        # 0 log 0 = 0, on either side.
        gain = torch.where(law > 0, log_law - log_probs, 0.0)
        return (law * gain).sum(dim=1)

    def draw(
        self,
        tau: NDArray[np.float64],
        clean: NDArray[np.int64],
        status: NDArray[np.float64],
        token: NDArray[np.float64],
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """What columns hold at their times.

        Args:
            tau: times, broadcast against the others.
            clean: finished tokens.
            status: uniform numbers in [0, 1) that decide the status.
            token: uniform numbers in [0, 1) that decide which wrong token.

        Returns:
            statuses (ABSENT ...), and tokens; the token of an absent or masked column is its
            finished one.
        """
        found = self.statuses(torch.from_numpy(np.asarray(tau, dtype=np.float64)))
        each = (self.vocab - 1) * found.wrong
        edges = np.stack([p.numpy() for p in (found.absent, found.masked, each)]).cumsum(axis=0)
        held = (status >= edges).sum(axis=0)
        other = np.minimum((token * (self.vocab - 1)).astype(np.int64), self.vocab - 2)
        other += other >= clean
        return held, np.where(held == WRONG, other, clean)


@dataclass(frozen=True)
class Statuses:
    """Probabilities at one time; with `(V-1) * wrong` they add up to one."""

    absent: Tensor
    masked: Tensor
    wrong: Tensor
    """Of each single wrong token."""
    clean: Tensor
