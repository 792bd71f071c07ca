"""What blocks were opened with, held against the decoder's own rule, from the log alone."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from abf.decode.replay import Folded
from abf.errors import ArtifactError


def check_earlier(table: pa.Table, folded: Mapping[int, Folded], *, back: int, where: str) -> None:
    """Hold every block to extent `earlier`: it opens with the block `back` blocks before it.

    Args:
        table: EVENTS rows.
        folded: what they fold to.
        back: of the decoder's extent.
        where: name of the log, for errors.

    Raises:
        ArtifactError: a block that opens with another text; names it.
    """
    step, kind = table["step"].to_numpy(), table["type"].to_numpy()
    told = (step == -1) & np.isin(kind, ["PROMPT", "OPEN", "FILL"])
    names = ["request", "block", "type", "new_id", "length", "seq"]
    rows = table.filter(pa.array(told)).select(names).to_pylist()
    rows.sort(key=lambda row: (row["request"], row["seq"]))
    for request, events in itertools.groupby(rows, key=lambda row: row["request"]):
        state, mine = folded[request], list(events)
        shown = [e["length"] for e in mine if e["type"] == "PROMPT" and e["length"] > 0]
        lengths = [*shown, *state.block_lengths]
        text = [*state.prompt_ids, *state.token_ids]
        first = len(state.prompt_ids) - sum(shown)
        starts = [first, *(first + np.cumsum(lengths, dtype=np.intp)).tolist()]
        for opening in (e for e in mine if e["type"] == "OPEN"):
            block, length = opening["block"], opening["length"]
            held = [e["new_id"] for e in mine if e["type"] == "FILL" and e["block"] == block]
            number = len(shown) + block - back
            due = text[starts[number] : starts[number + 1]][:length] if number >= 0 else []
            if not due or held != due or len(held) != length:
                raise ArtifactError(
                    f"{where}: first bad event is request {request}, seq {opening['seq']} (OPEN, "
                    f"block {block}): it opens with {held}, but the block {back} before is {due}"
                )
