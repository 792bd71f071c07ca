"""The block is opened with the text of an earlier one, as a draft to be edited.

So a text is revised: what a finished block says is not written anew from masks, only what the next
version of it says otherwise.
"""

from __future__ import annotations

from abf.decode.config import EarlierExtent
from abf.decode.view import Extent, ExtentView


class Earlier:
    """As long as that block, and with its tokens."""

    needs_lengths = False

    def __init__(self, back: int) -> None:
        self.back = back

    def next_extent(self, view: ExtentView) -> Extent:
        """The earlier block's tokens."""
        assert view.earlier is not None, "the engine gives the block that a policy asks for"
        return Extent(len(view.earlier), view.earlier)


def build(cfg: EarlierExtent) -> Earlier:
    """The policy of its config."""
    return Earlier(cfg.back)
