"""Peak memory of training: computed for an A100 of 64 GB, and the computing held against this CPU.

python -m benchmarks memory               # computed / measured at sizes that run here
python -m benchmarks.bench_memory         # the table of docs/memory.md
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from abf.hardware import bf16_instructions
from abf.model.config import ModelConfig
from abf.model.transformer import Transformer
from abf.train.config import TrainConfig
from abf.train.memory import Memory, Pass, Spread, parameters, peak_memory
from abf.train.runtime import settings
from abf.train.step import Trainer
from benchmarks.allocations import Allocations
from benchmarks.bench_train import write_rows
from benchmarks.statistics import Row

DEVICE_GB = 64
"""Memory of Leonardo's A100, 1e9 bytes."""
LENGTHS = (512, 1024, 2048, 4096, 8192)
SPREADS = {
    "1, 4, 16, 64": Spread(),
    "4, 16, 64": Spread("hybrid", 4),
    "4": Spread("full", 4),
    "16": Spread("full", 16),
    "64": Spread("full", 64),
}
"""By their numbers of ranks, four a node."""


def shape(
    vocab: int, d: int, layers: int, heads: int, kv: int, ff: int, *, tied: bool = True
) -> ModelConfig:
    """A Llama with heads of d / heads."""
    return ModelConfig(
        vocab_size=vocab, d_model=d, layers=layers, heads=heads, kv_heads=kv,
        head_dim=d // heads, d_ff=ff, tie_embeddings=tied,
    )  # fmt: skip


SHAPES = {
    "135M": shape(49_152, 576, 30, 9, 3, 1536),
    "360M": shape(49_152, 960, 32, 15, 5, 2560),
    "1.7B": shape(49_152, 2048, 24, 32, 32, 8192),
    "8B": shape(128_256, 4096, 32, 32, 8, 14_336, tied=False),
}
"""SmolLM2-135M, -360M and -1.7B, and Llama-3-8B."""
SMALL = {
    "1.3M": (shape(4096, 128, 4, 4, 2, 384), 512, 2),
    "30M": (shape(8192, 512, 8, 8, 8, 1408), 1024, 2),
    "135M": (SHAPES["135M"], 512, 1),
}
"""Shape, row length and rows of what is measured."""


def measured(
    cfg: ModelConfig, length: int, rows: int, *, precision: str, recompute: bool, folder: Path
) -> tuple[int, Memory]:
    """Bytes that tensors hold at the peak of one step, and what is computed for the same pass."""
    path = folder / f"{cfg.vocab_size}-{length}.arrow"
    write_rows(path, vocabulary=cfg.vocab_size, length=length)
    model = Transformer(cfg)
    model.initialise(torch.Generator().manual_seed(0))
    train = TrainConfig.model_validate(
        {
            "batch_rows": rows,
            "precision": precision,
            "checkpoint_activations": recompute,
            "tokens": 10**9,
        }
    )
    trainer = Trainer(train, seed=0, model=model, packed=path)
    read: list[int] = []
    hidden = model.hidden

    def noting(*inputs: object, **more: object) -> torch.Tensor:
        rows = more["rows"]
        assert isinstance(rows, torch.Tensor)
        read.append(len(rows))
        return hidden(*inputs, **more)  # pyright: ignore[reportArgumentType]

    model.hidden = noting
    trainer.step(0)  # AdamW's state comes to be
    with Allocations() as seen:
        result = trainer.step(1)
    standing = [
        *model.parameters(),
        trainer.optimiser.gradients,
        *trainer.optimiser.state().values(),
    ]
    work = Pass(
        rows=rows, length=length, read=read[-1], terms=(result.masked, result.tokens),
        precision="bf16" if precision == "bf16" else "fp32", recompute=recompute,
    )  # fmt: skip
    return sum(t.nbytes for t in standing) + seen.peak, peak_memory(cfg, work)


def run(quick: bool = False) -> list[Row]:
    """Rows of the benchmark table."""
    rows: list[Row] = []
    precisions = ("fp32", "bf16") if bf16_instructions() else ("fp32",)
    with tempfile.TemporaryDirectory() as folder, settings(threads=1):
        for name, (cfg, length, batch) in SMALL.items():
            if quick and name != "1.3M":
                continue
            for precision in precisions if name != "135M" else precisions[-1:]:
                for recompute in (False, True):
                    held, computed = measured(
                        cfg, length, batch, precision=precision, recompute=recompute,
                        folder=Path(folder),
                    )  # fmt: skip
                    again = ", layers computed again" if recompute else ""
                    ratio = computed.total / held
                    rows.append(
                        Row(
                            figure=f"memory, computed / measured, {name} {precision}{again}",
                            value=ratio,
                            low=ratio,
                            high=ratio,
                            unit="ratio",
                            detail=f"{parameters(cfg) / 1e6:.1f}M parameters, {batch} rows of "
                            f"{length}: {held / 1e6:.0f} MB held by tensors at the peak of a step "
                            "(one step: exact, no interval); goal 0.9 to 1.1",
                        )
                    )
    return rows


def table() -> Iterator[str]:
    """The table for docs/memory.md: 1e9 bytes a rank, one row a pass, bf16, every token masked."""
    for name, cfg in SHAPES.items():
        yield f"### {name}: {parameters(cfg) / 1e6:,.0f}M parameters, vocabulary {cfg.vocab_size:,}"
        yield ""
        yield "| ranks | sharding | states | " + " | ".join(f"L={n}" for n in LENGTHS) + " |"
        yield "|---|---|---|" + "---|" * len(LENGTHS)
        for ranks, spread in SPREADS.items():
            states = 16 * parameters(cfg) / spread.shards / 1e9
            cells = (_cell(cfg, length, spread) for length in LENGTHS)
            yield f"| {ranks} | {spread.sharding} | {states:.1f} | {' | '.join(cells)} |"
        yield ""


def _cell(cfg: ModelConfig, length: int, spread: Spread) -> str:
    both = (Pass.of_masks(1, length, recompute=again) for again in (False, True))
    return " / ".join(_gigabytes(peak_memory(cfg, work, spread).total) for work in both)


def _gigabytes(size: float) -> str:
    text = f"{size / 1e9:.1f}"
    return text if size <= DEVICE_GB * 1e9 else f"~~{text}~~"


if __name__ == "__main__":
    print("\n".join(table()))
