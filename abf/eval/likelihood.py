"""Held-out bits per byte: AR view, base model, and the block bound with and without boundary bits.

Over packed held-out rows; every document pays for the token that closes it. The bound charges the
text given the cuts; with boundary bits (-log2 p(S_b | text before)) it is a code for text *and*
cuts, and so comparable with an AR model (notes/method.md, section D; notes/training.md 3.3).

Letters: B rows, L row length, P pieces, D documents. Charges are nats inside, reported in bits.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from abf.artifacts import PIECES, read_table
from abf.data.loader import PackedBatch, PackedRows, spread
from abf.diffusion.corrupt.base import build_corruption
from abf.diffusion.layout import block_starts, predicted
from abf.diffusion.loss import ar_charges, block_charges, scatter
from abf.eval.base import Measure, Ratio, Single, Subject
from abf.eval.config import LikelihoodTask
from abf.model.transformer import Transformer
from abf.track.progress import Progress
from abf.train.config import BlockObjective

BACKEND = "tiles"
NOISE_SEED = 20_261_122
"""Seed of the noise draws: the same for every run, so that runs are compared on the same masks."""

Sums = NDArray[np.float64]
"""[D] a number for every document."""


class HeldOut:
    """The rows that are scored, and whose documents they hold."""

    def __init__(self, folder: Path, *, max_rows: int | None, batch_rows: int) -> None:
        self._rows = PackedRows(folder / "heldout.arrow")
        self._batch_rows = batch_rows
        self.count = min(len(self._rows), max_rows or len(self._rows))
        """Rows."""
        # The split keeps the order of the sources: its first rows would be of one kind of text.
        self._scored = spread(len(self._rows), self.count)
        pieces = read_table(folder / "heldout.pieces.parquet", PIECES)
        scored = np.isin(pieces["row"].to_numpy(), self._scored)
        names, owner = np.unique(
            np.array(pieces["doc_id"].to_pylist())[scored], return_inverse=True
        )
        self.documents: list[str] = names.tolist()
        self._owner = np.full(len(pieces), -1)
        self._owner[scored] = owner
        n_bytes = pieces["n_bytes"].to_numpy()[scored].astype(np.float64)
        self.n_bytes = self.zeros()
        """[D] UTF-8 bytes of text that are scored."""
        np.add.at(self.n_bytes, owner, n_bytes)

    def batches(self, progress: Progress) -> Iterator[PackedBatch]:
        """All scored rows, in order."""
        for start in range(0, self.count, self._batch_rows):
            batch = self._rows.rows(self._scored[start : start + self._batch_rows])
            yield batch
            progress.update(len(batch.row))

    def by_document(self, batch: PackedBatch, values: NDArray[np.floating | np.bool_]) -> Sums:
        """Values [B, L] summed over each document's slots."""
        inside = batch.document_id >= 0
        total = self.zeros()
        np.add.at(total, self._owner[batch.document_id[inside]], values[inside])
        return total

    def zeros(self) -> Sums:
        """Nothing yet."""
        return np.zeros(len(self.documents))

    def per_byte(self, metric: str, nats: Sums, note: str = "") -> Ratio:
        """Bits per byte."""
        bits = nats / math.log(2)
        return Ratio(metric, "bits/byte", self.documents, bits, self.n_bytes, note)


class Likelihood:
    """See the module."""

    version = 3

    def __init__(self, cfg: LikelihoodTask) -> None:
        self.cfg = cfg

    def measure(self, subject: Subject, decoded: Path | None) -> list[Measure]:
        """AR rows for every run; block rows for one trained on blocks."""
        held = HeldOut(
            subject.packed / "packed", max_rows=self.cfg.max_rows, batch_rows=self.cfg.batch_rows
        )
        objective = subject.objective
        draws = self.cfg.samples if objective.kind == "block" else 0
        passes = subject.causal + 1 + draws
        found: list[Measure] = []
        with (
            Progress(subject.label, held.count * passes, unit="rows") as progress,
            subject.inference(),
        ):
            if subject.causal:
                nats = ar_nats(subject.model, held, progress)
                found.append(held.per_byte("ar_bits_per_byte", nats))
            nats = ar_nats(subject.base, held, progress)
            found.append(held.per_byte("base_bits_per_byte", nats))
            if objective.kind == "block":
                found += block_measures(subject.model, objective, held, draws, progress)
        return found


def ar_nats(model: Transformer, held: HeldOut, progress: Progress) -> Sums:
    """Next-token NLL of each document."""
    total = held.zeros()
    for batch in held.batches(progress):
        charges = scatter(ar_charges(model, batch, backend=BACKEND), batch)
        total += held.by_document(batch, charges)
    return total


def block_measures(
    model: Transformer, objective: BlockObjective, held: HeldOut, draws: int, progress: Progress
) -> list[Measure]:
    """The bound from `draws` independent noise draws, boundary bits, block lengths."""
    corruption = build_corruption(objective.corruption.reported(), mask_id=model.mask_id)
    nelbo = np.zeros((draws, len(held.documents)))
    boundary, slots, blocks = held.zeros(), held.zeros(), held.zeros()
    for draw in range(draws):
        first = draw == 0
        for batch in held.batches(progress):
            epochs = np.zeros(len(batch.row), dtype=np.int64)
            # A seed a draw: draws of one seed are spread evenly, and their spread tells no error.
            noised = corruption.apply(batch, seed=NOISE_SEED + draw, epochs=epochs)
            charges = block_charges(
                model,
                batch,
                noised,
                loss=objective.loss,
                backend=BACKEND,
                terms=("nelbo", "length") if first else ("nelbo",),
                aligned=True,
            )
            nelbo[draw] += held.by_document(batch, scatter(charges["nelbo"], batch))
            if first:
                boundary += held.by_document(batch, scatter(charges["length"], batch))
                slots += held.by_document(batch, predicted(batch))
                blocks += held.by_document(batch, block_starts(batch))
    note = f"Monte Carlo, {draws} noise draws a block"
    bound, name = nelbo.mean(axis=0), "bound_with_boundary_bits_per_byte"
    bits = boundary / math.log(2)
    return [
        held.per_byte("bound_bits_per_byte", bound, note),
        held.per_byte(name, bound + boundary, note),
        monte_carlo_error(nelbo, held.n_bytes),
        Ratio("boundary_bits_per_block", "bits/block", held.documents, bits, blocks),
        Ratio("mean_block_length", "tokens", held.documents, slots, blocks),
    ]


def monte_carlo_error(nelbo: NDArray[np.float64], n_bytes: Sums) -> Single:
    """Standard error of the bound from its noise draws [draws, D] alone, the text held fixed."""
    metric, unit, draws = "bound_monte_carlo_error", "bits/byte", len(nelbo)
    if draws < 2:
        return Single(metric, unit, None, draws, "not measured: one noise draw has no spread")
    figures = nelbo.sum(axis=1) / math.log(2) / n_bytes.sum()
    return Single(metric, unit, float(figures.std(ddof=1) / math.sqrt(draws)), draws)


def build(cfg: LikelihoodTask) -> Likelihood:
    """The task of its config."""
    return Likelihood(cfg)
