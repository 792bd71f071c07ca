"""Text and cuts of a whole document through the model's losses, where everything can be enumerated.

One letter and the document token, blocks of at most two tokens; a document ends with the document
token as the last of a block. Masks are filled one at a time in random order (the process of
docs/method.md with p_D = p_u = 0), so what a block is is the mean over orders.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from abf.data.loader import PackedBatch
from abf.diffusion.config import LossConfig
from abf.diffusion.corrupt.base import Noised
from abf.diffusion.layout import run_starts
from abf.diffusion.loss import block_charges, scatter
from abf.model.transformer import Transformer
from tests.diffusion.rows import tiny_model

LETTER, END, MASK = 1, 0, 2
MOST = 2
LOSS = LossConfig(ar_weight=0)
Text = tuple[int, ...]
Blocks = tuple[Text, ...]


@pytest.fixture(scope="module")
def model() -> Transformer:
    return tiny_model(vocab_size=2, max_block=MOST, d_model=12, seed=5)


class Plain:
    """The model by one uncached pass a state."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    def states(self, context: Text, block: Text) -> torch.Tensor:
        """[c + m, d]; the context is causal, the block sees all."""
        c, m = len(context), len(block)
        seen = torch.ones(c + m, c + m, dtype=torch.bool).tril()
        seen[c:, c:] = True

        def attend(
            layer: int,
            q: torch.Tensor,
            k: torch.Tensor,
            v: torch.Tensor,
            rows: torch.Tensor | None = None,
        ) -> torch.Tensor:
            return torch.nn.functional.scaled_dot_product_attention(
                q, k, v, attn_mask=seen, enable_gqa=True
            )

        with torch.no_grad():
            ids = torch.tensor([[*context, *block]])
            return self.model.hidden(ids, torch.arange(c + m)[None], attend)[0]

    def lengths(self, context: Text) -> list[float]:
        """P(0..MOST slots | context)."""
        state = self.states(context, ())[-1]
        return self.model.length_logits(state).detach().softmax(-1).tolist()

    def block(self, context: Text, y: Text) -> float:
        """p(y | context, its length): mean over the orders in which masks are filled."""
        found, orders = 0.0, list(itertools.permutations(range(len(y))))
        for order in orders:
            held, p = [MASK] * len(y), 1.0
            for slot in order:
                states = self.states(context, tuple(held))
                row = self.model.logits(states[len(context) + slot - 1]).detach().softmax(-1)
                p *= float(row[y[slot]])
                held[slot] = y[slot]
            found += p / len(orders)
        return found


def grown(plain: Plain, tokens: int) -> Iterator[tuple[str, Blocks, float]]:
    """Every way a document begins and goes on for so many tokens, with its probability: `whole`,
    `open` (it has not ended), or `none` (an empty block, or a document token with text behind it:
    no packed text has them)."""

    def rest(blocks: Blocks, p: float) -> Iterator[tuple[str, Blocks, float]]:
        text = tuple(itertools.chain(*blocks))
        if len(text) >= tokens:
            yield "open", blocks, p
            return
        context = (END, *text)
        for n, chance in enumerate(plain.lengths(context)):
            if n == 0:
                yield "none", blocks, p * chance
            for y in itertools.product((END, LETTER), repeat=n) if n else ():
                here = p * chance * plain.block(context, y)
                if END in y[:-1]:
                    yield "none", (*blocks, y), here
                elif y[-1] == END:
                    yield "whole", (*blocks, y), here
                else:
                    yield from rest((*blocks, y), here)

    return rest((), 1.0)


def charged(model: Transformer, blocks: Blocks) -> float:
    """Bound on -log p(text, cuts), nats: every subset of masks of each block, through the loss."""
    text = [END, *itertools.chain(*blocks)]
    ids = np.array([text])
    block_id = np.array([[0, *(k + 1 for k, y in enumerate(blocks) for _ in y)]])
    batch = PackedBatch(ids, block_id, np.zeros_like(ids), np.arange(1))
    total, length = 0.0, 0.0
    starts = np.cumsum([1, *(len(y) for y in blocks)])
    for start, y in zip(starts, blocks, strict=False):
        for k in range(1, len(y) + 1):
            for subset in itertools.combinations(range(len(y)), k):
                hidden = np.zeros(ids.shape, dtype=bool)
                hidden[0, [start + j for j in subset]] = True
                noised = Noised(
                    np.where(hidden, MASK, ids), run_starts(block_id), hidden, hidden * 1.0
                )
                with torch.no_grad():
                    found = block_charges(
                        model, batch, noised, loss=LOSS, backend="reference",
                        terms=("nelbo", "length"),
                    )  # fmt: skip
                nats = float(scatter(found["nelbo"], batch).sum())
                total += nats / k / math.comb(len(y), k)
                length = float(scatter(found["length"], batch).sum())
    return total + length


def test_probabilities_of_text_and_cuts_add_up_to_one(model: Transformer) -> None:
    plain = Plain(model)
    lengths = plain.lengths((END, LETTER))
    assert sum(lengths) == pytest.approx(1, abs=1e-12)
    total = {"whole": 0.0, "open": 0.0, "none": 0.0}
    for kind, _, p in grown(plain, 4):
        total[kind] += p
    assert sum(total.values()) == pytest.approx(1, abs=1e-9)
    assert total["whole"] > 0.2


def test_no_text_with_its_cuts_is_likelier_than_its_charges_say(model: Transformer) -> None:
    """Documents and their beginnings; a block of one token is charged exactly."""
    plain, mass, slack = Plain(model), 0.0, []
    for kind, blocks, p in grown(plain, 4):
        if kind == "none":
            continue
        bound = charged(model, blocks)
        slack.append(bound + math.log(p))
        assert slack[-1] >= -1e-9, blocks
        if max(map(len, blocks)) == 1:
            assert slack[-1] == pytest.approx(0, abs=1e-9), "blocks of one token are exact"
        mass += math.exp(-bound)
    assert max(slack) > 1e-3, "some bounds are loose"
    assert mass < 1
    assert len(slack) > 20
