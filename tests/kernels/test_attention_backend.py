"""Training and decoding by the Triton back end through the one seam, against the oracle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abf.decode.config import ArStrategy, DecoderConfig
from abf.decode.request import Prompt
from abf.errors import ConfigError
from abf.model.attention import check_backend
from abf.train.step import Trainer
from tests.decode.runs import block_config, run, tokens
from tests.decode.tiny import tiny_model
from tests.train.tiny_run import new_model, tiny_config, write_rows

CPU = torch.device("cpu")


@pytest.mark.parametrize("kind", ["block", "ar"])
def test_a_training_step(tmp_path: Path, kind: str) -> None:
    packed = write_rows(tmp_path)
    runs = []
    for backend in ("triton", "reference"):
        changes: dict[str, Any] = {"attention": backend, "objective": {"kind": kind}}
        trainer = Trainer(tiny_config(**changes), seed=0, model=new_model(), packed=packed)
        sums, *counts, _ = trainer.gradients(0)
        runs.append((sums, counts, trainer.optimiser.gradients))
    (sums, counts, gradients), (wanted_sums, wanted_counts, wanted) = runs
    assert counts == wanted_counts
    assert sums == pytest.approx(wanted_sums, rel=1e-5)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


def decoders(backend: str) -> list[DecoderConfig]:
    settings: dict[str, Any] = {"attention": backend, "precision": "fp32"}
    return [DecoderConfig(strategy=ArStrategy(), **settings), block_config(0.5, **settings)]


def test_decoding(tmp_path: Path) -> None:
    texts = [5, 9, 3], [7] * 20
    prompts = [Prompt(n, str(n), np.array(text)) for n, text in enumerate(texts)]
    model = tiny_model()
    found, wanted = (
        [
            tokens(run(tmp_path / f"{backend}-{number}", cfg, model, prompts, new_tokens=8))
            for number, cfg in enumerate(decoders(backend))
        ]
        for backend in ("triton", "reference")
    )
    assert found == wanted
    assert len(set(found[0][0])) > 2


def test_a_back_end_that_cannot_be_used_is_named_before_anything_is_computed() -> None:
    config = new_model().config
    check_backend("triton", config, device=CPU, precision="fp32")
    with pytest.raises(ConfigError, match="attention: 'triton' cannot be used here: q must be"):
        check_backend("triton", config, device=CPU, precision="bf16")
