"""How well the edit heads do on drafts, as counts that add up over micro-batches, ranks and steps.

Recall: of the operations a draft needs, how many are called for (a gate's likeliest choice; one or
more tokens expected missing, of a group that lacks some). Calibration of completion: ten bins of
its probability (ECE, and AUROC from the bins).
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

OPERATIONS = ("substitute", "delete", "insert")
BINS = 10
EDIT_COUNTS = tuple(
    f"{name}.{what}" for name in OPERATIONS for what in ("needed", "called", "right")
)
"""Names of what `watch_edits` counts."""
COMPLETE_COUNTS = tuple(
    f"complete.{what}.{number}"
    for what in ("blocks", "whole", "probability")
    for number in range(BINS)
)
"""Names of what `watch_complete` counts."""


def watch_edits(said: Tensor, action: Tensor, expected: Tensor, due: Tensor) -> Tensor:
    """Counts of EDIT_COUNTS, float64.

    Args:
        said: [R, 3] log-probabilities of keep, revise, delete of visible slots.
        action: [R, 3] which it is.
        expected: [K, m+1] tokens expected missing in each group.
        due: [K, m+1] tokens missing.
    """
    choice, truth = said.argmax(dim=-1), action.argmax(dim=-1)
    pairs = [(truth == kind, choice == kind) for kind in (1, 2)]
    pairs.append((due >= 1, expected >= 0.5))
    counts = [count for needed, called in pairs for count in (needed, called, needed & called)]
    return torch.stack([count.sum() for count in counts]).double()


def watch_complete(probability: Tensor, complete: Tensor) -> Tensor:
    """Counts of COMPLETE_COUNTS, float64: [K] probabilities and what they are of."""
    number = (probability * BINS).long().clamp(max=BINS - 1)
    values = torch.stack((torch.ones_like(probability), complete, probability)).double()
    return values.new_zeros(3, BINS).index_add_(1, number, values).flatten()


def summary(counts: Mapping[str, float]) -> dict[str, float]:
    """Metrics of counts: recall and precision of each operation; of completion the expected
    calibration error and the AUROC (of its bins), and the share of drafts that were whole. What was
    never needed or called has no figure."""
    found: dict[str, float] = {}
    for name in OPERATIONS:
        right = counts.get(f"{name}.right", 0.0)
        for what, total in (("recall", "needed"), ("precision", "called")):
            if of := counts.get(f"{name}.{total}", 0.0):
                found[f"{name}_{what}"] = right / of
    blocks, whole, probability = (
        [counts.get(f"complete.{what}.{number}", 0.0) for number in range(BINS)]
        for what in ("blocks", "whole", "probability")
    )
    if total := sum(blocks):
        found["complete_share"] = sum(whole) / total
        gaps = (abs(p - w) for p, w in zip(probability, whole, strict=True))
        found["complete_ece"] = sum(gaps) / total
        broken = [b - w for b, w in zip(blocks, whole, strict=True)]
        if pairs := sum(whole) * sum(broken):
            below = [sum(broken[:number]) + broken[number] / 2 for number in range(BINS)]
            wins = sum(w * low for w, low in zip(whole, below, strict=True))
            found["complete_auroc"] = wins / pairs
    return found
