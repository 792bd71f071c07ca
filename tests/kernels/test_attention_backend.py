"""Training and decoding by the Triton back end through the one seam, against the oracle."""

from __future__ import annotations

import importlib
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
OBJECTIVES: dict[str, dict[str, Any]] = {
    "block": {"kind": "block"},
    "block dropout": {"kind": "block", "stages": [{"until": 1, "history": {"dropout": 0.5}}]},
    "ar": {"kind": "ar"},
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> set[tuple[str, str]]:
    """Which back end of which operator is called from here on."""
    found: set[tuple[str, str]] = set()

    def watch(operator: str, backend: str, name: str) -> None:
        module = importlib.import_module(f"abf_kernels.{operator}.{backend}")
        compute = getattr(module, name)

        def watched(*args: Any, **kwargs: Any) -> Any:
            found.add((operator, backend))
            return compute(*args, **kwargs)

        monkeypatch.setattr(module, name, watched)

    for backend in ("reference", "tiles", "triton"):
        watch("block_attention", backend, "attend")
        watch("block_decode", backend, "attend")
        watch("masked_loss", backend, "loss")
        watch("masked_loss", backend, "predict")
    return found


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_a_training_step(tmp_path: Path, objective: str, called: set[tuple[str, str]]) -> None:
    packed = write_rows(tmp_path)
    runs = []
    for backend in ("triton", "reference"):
        called.clear()
        changes: dict[str, Any] = {
            "attention": backend, "objective": OBJECTIVES[objective], "batch_rows": 2,
        }  # fmt: skip
        trainer = Trainer(tiny_config(**changes), seed=0, model=new_model(), packed=packed)
        sums, *counts, _ = trainer.gradients(0)
        runs.append((sums, counts, trainer.optimiser.gradients))
        assert called == {("block_attention", backend), ("masked_loss", backend)}
    (sums, counts, gradients), (wanted_sums, wanted_counts, wanted) = runs
    assert counts == wanted_counts
    assert sums == pytest.approx(wanted_sums, rel=1e-5)
    assert wanted.abs().max() > 1e-3
    torch.testing.assert_close(gradients, wanted, rtol=1e-4, atol=1e-6)


def decoders(backend: str) -> list[DecoderConfig]:
    settings: dict[str, Any] = {"attention": backend, "precision": "fp32"}
    return [DecoderConfig(strategy=ArStrategy(), **settings), block_config(0.5, **settings)]


def test_decoding(tmp_path: Path, called: set[tuple[str, str]]) -> None:
    texts = [5, 9, 3], [7] * 20
    prompts = [Prompt(n, str(n), np.array(text)) for n, text in enumerate(texts)]
    model = tiny_model()
    runs = []
    for backend in ("triton", "reference"):
        called.clear()
        runs.append(
            [
                tokens(run(tmp_path / f"{backend}-{number}", cfg, model, prompts, new_tokens=8))
                for number, cfg in enumerate(decoders(backend))
            ]
        )
        assert called == {("block_decode", backend), ("masked_loss", backend)}
    found, wanted = runs
    assert found == wanted
    assert len(set(found[0][0])) > 2


def test_a_back_end_that_cannot_be_used_is_named_before_anything_is_computed() -> None:
    config = new_model().config
    check_backend("triton", config, device=CPU, precision="fp32")
    with pytest.raises(ConfigError, match="attention: 'triton' cannot be used here: q must be"):
        check_backend("triton", config, device=CPU, precision="bf16")
