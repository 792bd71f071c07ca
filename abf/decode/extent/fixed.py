"""Every block has the same length."""

from __future__ import annotations

from abf.decode.config import FixedExtent
from abf.decode.view import Extent, ExtentView


class Fixed:
    """The same extent, whatever the text."""

    needs_lengths = False
    back = 0

    def __init__(self, length: int) -> None:
        self.extent = Extent(length)

    def next_extent(self, view: ExtentView) -> Extent:
        """The fixed extent."""
        return self.extent


def build(cfg: FixedExtent) -> Fixed:
    """The policy of its config."""
    return Fixed(cfg.length)
