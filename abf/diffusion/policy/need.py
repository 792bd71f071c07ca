"""What blocks that are being edited need by their gates: masks put in, or masks and tokens out.

A group is the gaps between two visible tokens, with the masks there: a mask put into any of its
gaps gives the same text. A finished draft lacks tokens in a group or has masks too many there,
never both, so a group's need is the difference of what a model expects of either. The sampler and
the drafts that a model writes of its own in training ask here (docs/method.md, section 8).

Letters: P places of all blocks: the slots of each, then its end; the gap of a place lies before it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Places:
    """Slots and ends of blocks, one block behind the other."""

    missing: NDArray[np.floating]
    """[P] expected tokens missing in the gap before."""
    delete: NDArray[np.floating]
    """[P] probability that nothing belongs in the slot; 0 at an end."""
    is_mask: NDArray[np.bool_]
    """[P]"""
    is_end: NDArray[np.bool_]
    """[P]"""

    @property
    def group(self) -> NDArray[np.intp]:
        """[P] number of the group of a gap, and of a mask behind it; no block shares one."""
        return np.cumsum(~self.is_mask) - ~self.is_mask

    @property
    def block(self) -> NDArray[np.intp]:
        """[P] number of the block."""
        return np.cumsum(self.is_end) - self.is_end

    def net(self) -> NDArray[np.float64]:
        """[P] expected tokens missing in the gap's group, less the masks there that are expected
        to be too many."""
        surplus = np.where(self.is_mask, self.delete, 0.0).astype(np.float64)
        group = self.group
        return np.bincount(group, self.missing - surplus).astype(np.float64)[group]

    def deletions(
        self, *, bar: float, locked: NDArray[np.bool_] | None = None
    ) -> NDArray[np.bool_]:
        """[P] slots to take out: of a group's masks the surplus at most; never all of a block.

        Args:
            bar: probability that has to be reached, and least surplus.
            locked: [P] slots that stay whatever is said of them.
        """
        chosen = ~self.is_end & (self.delete >= bar)
        if locked is not None:
            chosen &= ~locked
        surplus, group = -self.net(), self.group
        counts = np.where(surplus >= bar, np.floor(surplus + 0.5).clip(min=1), 0)
        masks = np.flatnonzero(self.is_mask)
        order = masks[np.lexsort((-self.delete[masks], group[masks]))]
        chosen[order] &= _rank(group[order]) < counts[order]
        slots, block = np.flatnonzero(~self.is_end), self.block
        least = slots[np.lexsort((self.delete[slots], block[slots]))]
        least = least[_rank(block[least]) == 0]  # of each block with slots
        spared = np.bincount(block[slots], ~chosen[slots])
        chosen[least] &= spared[block[least]] > 0
        return chosen

    def insertions(
        self, *, bar: float, most: int, open_: NDArray[np.bool_] | None = None
    ) -> NDArray[np.intp]:
        """[P] masks to put into each gap: of a group, into the gap that misses most.

        A block gets no more than its groups lack in all, the neediest first: a model that cannot
        tell which of two gaps lacks a token expects half of one in either; both would be filled.

        Args:
            bar: need of a group that has to be reached.
            most: masks put into one gap.
            open_: [P] gaps into which masks may be put; a group whose neediest is none gets none.
        """
        net, group, block = self.net(), self.group, self.block
        best = np.lexsort((-self.missing, group))
        best = best[_rank(group[best]) == 0]
        lacking = np.bincount(block[best], net[best].clip(min=0))
        lacking = np.floor(lacking + 0.5).clip(min=1).astype(np.intp)
        best = best[net[best] >= bar]
        if open_ is not None:
            best = best[open_[best]]
        best = best[np.lexsort((-net[best], block[best]))]
        wanted = np.floor(net[best] + 0.5).clip(1, most).astype(np.intp)
        before = wanted.cumsum() - wanted
        before -= before[np.arange(len(best)) - _rank(block[best])]  # of the same block alone
        counts = np.zeros(len(net), dtype=np.intp)
        counts[best] = np.clip(lacking[block[best]] - before, 0, wanted)
        return counts


def one_block(
    missing: NDArray[np.floating], delete: NDArray[np.floating], is_mask: NDArray[np.bool_]
) -> Places:
    """Places of one block, from its gaps [n+1] and slots [n]."""
    is_end = np.arange(len(missing)) == len(is_mask)
    return Places(missing, np.append(delete, 0.0), np.append(is_mask, False), is_end)


def _rank(keys: NDArray[np.intp]) -> NDArray[np.intp]:
    """Place of each among equal keys, which stand together."""
    fresh = np.diff(keys, prepend=-1) != 0
    begins = np.flatnonzero(fresh)
    return np.arange(len(keys)) - begins[np.cumsum(fresh) - 1] if len(keys) else begins
