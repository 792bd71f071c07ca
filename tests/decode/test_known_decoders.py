"""What the ABF sampler becomes with operations left out: other systems' greedy decoders, in lists.

One token a block is the AR model, and FILL alone in a fixed block the threshold rule of SDAR and
Fast-dLLM, in test_engine.py and test_abf.py. Systems that are only *like* a setting train other
heads; what is compared is what they do with the same numbers.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from abf.base import build
from abf.decode.config import AbfStrategy, FixedExtent, LengthHeadExtent, ThresholdStrategy
from abf.model.attention import RangeAttend
from abf.model.transformer import EDITS, Transformer
from tests.decode.test_abf import PlainLoop
from tests.decode.tiny import S, V, edit_model, tiny_decode, tiny_engine, tiny_model, tiny_prompts

NEW = 24


def finished(known: list[int], start: int) -> bool:
    return len(known) - start >= NEW or 0 in known[start:]


def upto_end(block: list[int]) -> list[int]:
    return block[: block.index(0) + 1] if 0 in block else block


# fixed block, fill and replace: LLaDA 2.1 --------------------------------------------------------


def llada21_block(
    loop: PlainLoop, known: list[int], size: int, fill: float, edit: float
) -> tuple[list[int] | None, int]:
    """arXiv 2602.08676: at each step masks whose likeliest token reaches one bar are filled (else
    the surest), and tokens are replaced by a likelier one that reaches another; until nothing is
    to do. Also how many were replaced; None when a text comes back: theirs stops by a cap."""
    block, seen, replaced = [V] * size, set(), 0
    while tuple(block) not in seen:
        seen.add(tuple(block))
        probs, _ = loop.read(known, block)
        best, token = probs.max(-1)
        masks = [j for j in range(size) if block[j] == V]
        write = [j for j in masks if best[j] >= fill]
        if masks and not write:
            write = [max(masks, key=lambda j: float(best[j]))]
        wrong = [j for j in range(size) if block[j] not in (V, int(token[j])) and best[j] >= edit]
        if not write and not wrong:
            return block, replaced
        replaced += len(wrong)
        for j in write + wrong:
            block[j] = int(token[j])
    return None, replaced


@pytest.mark.parametrize("shift", [True, False])
def test_fill_and_substitute_in_a_fixed_block_is_llada21(tmp_path: Path, shift: bool) -> None:
    """With a gate that leaves every token to the bar; above one half the best token is the only
    one that can reach it."""
    model = edit_model(model=tiny_model(scale=24.0))
    with torch.no_grad():
        model.edit_head.weight.zero_()
        model.edit_head.bias[EDITS.index("revise")] = 60.0
        model.edit_head.bias[EDITS.index("delete")] = -60.0
    cfg = AbfStrategy(operations=("fill", "substitute"), fill=0.05, substitute=0.51, complete=0.0)
    engine = tiny_engine(
        model, build(cfg, room="abf.decode.strategy"), shift=shift, edits_per_slot=99,
        extent=build(FixedExtent(length=8), room="abf.decode.extent"),
    )  # fmt: skip
    prompts = tiny_prompts(6)
    samples = tiny_decode(tmp_path / "log", engine, prompts, new_tokens=NEW)
    loop, compared, replaced = PlainLoop(model, cfg, shift=shift), 0, 0
    for prompt, sample in zip(prompts, samples, strict=True):
        known = [0, *prompt.token_ids.tolist()]
        start = len(known)
        while not finished(known, start):
            block, count = llada21_block(loop, known, 8, cfg.fill, cfg.substitute)
            if block is None:
                break
            known, replaced = known + upto_end(block), replaced + count
        delivered = sample.token_ids.tolist()
        assert delivered[: len(known) - start] == known[start:]
        assert (known[start:] == delivered) or sample.oscillating_blocks
        compared += len(known) - start
    assert compared > 60
    assert replaced > 20, "without one it would be the threshold rule"


# extent of the length head, masks alone: SemBlock ------------------------------------------------


@pytest.mark.parametrize("shift", [True, False])
def test_a_boundary_head_and_masks_alone_is_a_loop_of_both(tmp_path: Path, shift: bool) -> None:
    """arXiv 2606.04964: where the block ends is said first; then it is filled by confidence."""
    model, bar = tiny_model(), 0.4
    engine = tiny_engine(
        model,
        build(ThresholdStrategy(threshold=bar), room="abf.decode.strategy"),
        shift=shift,
        extent=build(LengthHeadExtent(pick="mode"), room="abf.decode.extent"),
    )
    prompts, lengths = tiny_prompts(), set()
    samples = tiny_decode(tmp_path / "log", engine, prompts, new_tokens=NEW)
    for prompt, sample in zip(prompts, samples, strict=True):
        known = [0, *prompt.token_ids.tolist()]
        start = len(known)
        while not finished(known, start):
            state = states(model, known, [])[-1]
            size = int(model.length_logits(state.detach())[1:].argmax()) + 1
            size = min(size, start + NEW - len(known))
            lengths.add(size)
            known = known + filled(model, known, size, bar, shift=shift)
        assert sample.token_ids.tolist() == known[start:]
    assert len(lengths) > 2
    assert max(lengths) <= S


def states(model: Transformer, known: list[int], block: list[int]) -> torch.Tensor:
    """[known + block, d] by one uncached pass; the known text is causal, the block sees all."""
    row = torch.arange(len(known) + len(block))
    end = torch.where(row < len(known), row + 1, len(row))
    ranges = torch.stack([row * 0, end, row * 0, row * 0], -1)[None]
    with torch.no_grad():
        attend = RangeAttend(ranges, backend="reference")
        return model.hidden(torch.tensor([known + block]), row[None], attend)[0]


def filled(
    model: Transformer, known: list[int], size: int, bar: float, *, shift: bool
) -> list[int]:
    """Masks that reach the bar, else the surest, until none is left before the text's end."""
    block = [V] * size
    while V in upto_end(block):
        found = states(model, known, block)[len(known) - shift :][:size]
        best, token = model.logits(found).softmax(-1).max(-1)
        masks = [j for j in range(len(upto_end(block))) if block[j] == V]
        sure = [j for j in masks if best[j] >= bar] or [max(masks, key=lambda j: float(best[j]))]
        for j in sure:
            block[j] = int(token[j])
    return upto_end(block)
