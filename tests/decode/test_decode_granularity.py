"""A granularity that a model was trained with: learnt, obeyed by the sampler, refused elsewhere.

Letters: S longest block.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from abf.checked import validate
from abf.config import RunConfig
from abf.decode.config import DecoderConfig, LengthHeadExtent, ThresholdStrategy
from abf.decode.request import Prompt
from abf.decode.trace import read_trace
from abf.diffusion.layout import block_lengths, block_starts
from abf.errors import ConfigError
from abf.model.store import load_model, save_model, with_granularities
from abf.model.transformer import Transformer
from abf.train.step import Trainer
from tests.decode.runs import run
from tests.decode.tiny import tiny_model, tiny_prompts
from tests.train.tiny_run import S, new_model, tiny_config, write_rows

LENGTHS = (1, 6)
STAGES = [
    {"until": 1, "block_cap": 1, "granularity": {"lengths": LENGTHS, "told": 0.8}},
]
"""Blocks of one token and, joined, of six on average."""


def decoder(granularity: int | None) -> DecoderConfig:
    return DecoderConfig(
        strategy=ThresholdStrategy(threshold=0),
        extent=LengthHeadExtent(),
        precision="fp32",
        granularity=granularity,
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Transformer, Trainer]:
    """A tiny model after 150 steps on text whose blocks are short or long, document by document."""
    folder = tmp_path_factory.mktemp("granular")
    cfg = tiny_config(
        objective={"kind": "block", "loss": {"length_weight": 1.0}, "stages": STAGES},
        tokens=150 * 12 * 48,
        batch_rows=12,
        optim={"lr": 0.01},
    )
    assert cfg.objective.kind == "block"
    model = with_granularities(new_model(), cfg.objective.granularities)
    trainer = Trainer(cfg, seed=0, model=model, packed=write_rows(folder, rows=400))
    for number in range(trainer.steps):
        trainer.step(number)
    save_model(model, folder / "model")
    return load_model(folder / "model").eval(), trainer


def histograms(trainer: Trainer) -> dict[int, NDArray[np.float64]]:
    """Oracle: the lengths [S+1] of the blocks that documents of each granularity were cut into
    (-1: of those that were not told theirs)."""
    found = {told: np.zeros(S + 1) for told in (-1, 0, 1)}
    for number in range(trainer.steps):
        rows, epochs = trainer.row_indices(number)
        batch = trainer._grouped(number, trainer.rows.rows(rows), epochs)
        assert batch.granularity is not None
        starts = block_starts(batch)
        for told in found:
            lengths = block_lengths(batch)[starts & (batch.granularity == told)]
            found[told] += np.bincount(lengths, minlength=S + 1)
    return {told: counts / counts.sum() for told, counts in found.items()}


def opened(path: Path) -> NDArray[np.float64]:
    """Shares [S+1] of the lengths that blocks were opened with, but for a text's last."""
    _, table, _ = read_trace(path)
    found: dict[int, list[int]] = {}
    for event in table.to_pylist():
        if event["type"] == "OPEN":
            found.setdefault(event["request"], []).append(event["length"])
    lengths = [length for each in found.values() for length in each[:-1]]
    return np.bincount(lengths, minlength=S + 1) / len(lengths)


def test_what_the_model_is_told_sets_its_law_of_lengths(
    trained: tuple[Transformer, Trainer], tmp_path: Path
) -> None:
    model, trainer = trained
    oracle = histograms(trainer)
    assert oracle[0][1] == 1
    assert 3 < oracle[1] @ np.arange(S + 1) < 6  # S = 8 keeps joins below a mean of 6
    means = {}
    for told, length in ((-1, None), (0, 1), (1, 6)):
        rng = np.random.default_rng(0)
        prompts = [Prompt(i, f"text-{i}", rng.integers(1, 61, size=i % 6)) for i in range(150)]
        run(tmp_path / "log", decoder(length), model, prompts, new_tokens=20)
        law = opened(tmp_path / "log")
        means[length] = law @ np.arange(S + 1)
        distance = np.abs(law - oracle[told]).sum() / 2
        assert distance < 0.15, (length, law, oracle[told])
    assert means[1] < 1.1 < 1.3 < means[None] < 2 < 3 < means[6]


def test_the_text_that_is_written_is_audited_as_ever(
    trained: tuple[Transformer, Trainer], tmp_path: Path
) -> None:
    """The AR audit of a text does not know what its blocks were told."""
    model, _ = trained
    prompts = [Prompt(i, f"text-{i}", np.arange(1, 2 + 3 * i)) for i in range(4)]
    for sample, prompt in zip(
        run(tmp_path / "log", decoder(6), model, prompts), prompts, strict=True
    ):
        text = [0, *prompt.token_ids.tolist(), *sample.token_ids.tolist()]
        ids, row = torch.tensor([text]), torch.arange(len(text))
        zero = row * 0
        ranges = torch.stack([zero, row + 1, zero, zero], dim=-1)[None]
        with torch.inference_mode():
            states = model.hidden(ids, row[None], model.attend(ranges, backend="reference"))[0]
            log_probs = model.logits(states[:-1]).log_softmax(-1)
        wanted = log_probs.gather(1, ids[0, 1:, None])[len(prompt.token_ids) :, 0]
        np.testing.assert_allclose(sample.log_probs, wanted.numpy(), rtol=0, atol=2e-4)


def test_a_model_that_was_not_trained_with_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"granularity=6: .* told it of no granularity"):
        run(tmp_path / "log", decoder(6), tiny_model(), tiny_prompts(1))
    with pytest.raises(ConfigError, match=r"granularity=6: .* told it of \[2, 4\] alone"):
        run(tmp_path / "log", decoder(6), with_granularities(tiny_model(), (2, 4)), tiny_prompts(1))


def test_a_run_is_refused_before_it_is_planned() -> None:
    stages = {"stages": [{"until": 1, "granularity": {"lengths": [4, 32]}}]}
    training = {"objective": {"kind": "block"} | stages}
    told = {"strategy": {"kind": "threshold"}, "extent": {"kind": "length_head"}}
    validate(RunConfig, {"train": training, "decoders": {"d": told | {"granularity": 4}}}, "here")
    for settings, words in (
        ({"decoders": {"d": told | {"granularity": 4}}}, "a training without granularities"),
        (
            {"train": training, "decoders": {"d": told | {"granularity": 8}}},
            r"decoders.d.granularity=8 asks for what a training that has \[4, 32\] does not teach",
        ),
        ({"train": training, "pack": {"max_block": 16}}, "granularity 32 is longer than any block"),
        (
            {"decoders": {"d": {"strategy": {"kind": "ar"}, "granularity": 4}}},
            "granularity=4: strategy `ar` opens no block",
        ),
    ):
        with pytest.raises(ConfigError, match=words):
            validate(RunConfig, settings, "here")
