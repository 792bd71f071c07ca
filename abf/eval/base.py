"""What a task is: it measures one trained model and gives figures with their parts by document.

For every `Ratio`, the figure is sum(numerator) / sum(denominator) in the unit it names: parts need
no conversion to be pooled or resampled.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from abf.model.device import own_device
from abf.model.huggingface import load_hf
from abf.model.store import load_model
from abf.model.transformer import Transformer
from abf.train.config import Objective


@dataclass(frozen=True)
class Ratio:
    """A figure with its parts by document."""

    metric: str
    unit: str
    documents: Sequence[str]
    numerator: NDArray[np.float64]
    """[documents]"""
    denominator: NDArray[np.float64]
    """[documents]"""
    note: str = ""


@dataclass(frozen=True)
class Single:
    """A figure without parts; None when it was not measured, and the note says why."""

    metric: str
    unit: str
    value: float | None
    n: int
    note: str = ""


Measure = Ratio | Single


@dataclass(frozen=True)
class Subject:
    """The run that is scored, and what it is held against."""

    model_dir: Path
    base_dir: Path
    packed: Path
    """Stage directory of `pack`."""
    tokenizer: Path
    """Folder with tokenizer.json."""
    objective: Objective
    """What it was trained for."""
    precision: str
    label: str

    @cached_property
    def model(self) -> Transformer:
        """The trained model."""
        return load_model(self.model_dir).to(own_device()).eval()

    @cached_property
    def base(self) -> Transformer:
        """The AR model it was converted from; judge of generated text."""
        document_id = self.model.config.document_id
        return load_hf(self.base_dir, document_id=document_id).to(own_device()).eval()

    @property
    def causal(self) -> bool:
        """Whether the trained model's clean stream is an AR model."""
        if self.objective.kind == "ar":
            return True
        return self.objective.loss.clean_stream == "context_causal"

    @contextlib.contextmanager
    def inference(self) -> Iterator[None]:
        """No gradients, and the run's precision."""
        lower = torch.autocast(
            self.model.head_weight.device.type,
            dtype=torch.bfloat16,
            enabled=self.precision == "bf16",
        )
        with torch.inference_mode(), lower:
            yield


class Task(Protocol):
    """An evaluation protocol; bump `version` when its figures change meaning."""

    version: int

    def measure(self, subject: Subject, decoded: Path | None) -> list[Measure]:
        """Figures of the subject.

        Args:
            subject: the run.
            decoded: stage directory of its decode, for a task that generates text.
        """
        ...
