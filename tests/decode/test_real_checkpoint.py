"""SmolLM2-135M itself, from its Python package: imported, and decoded beside `transformers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from abf.config import load
from abf.decode.config import FixedExtent
from abf.decode.request import Prompt
from abf.decode.task import decode
from abf.decode.trace import TraceWriter
from abf.model.config import ImportedBase
from abf.model.convert import import_checkpoint
from abf.model.huggingface import load_hf
from tests.decode.runs import AR, block_config

PROMPTS = (
    "The capital of France is",
    "Water boils at a temperature of",
    "In 1969, the first human beings",
)
NEW = 32


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of config/smollm2.yaml, dequantised."""
    torch.set_num_threads(1)  # two wait for each other where other tests run beside
    base = load(Path("config/smollm2.yaml")).base
    assert isinstance(base, ImportedBase)
    out = tmp_path_factory.mktemp("smollm2")
    counts = import_checkpoint(base, out)
    assert counts["parameters"] == 134_515_008, "the model card's 135M, tied head counted once"
    return out / "base"


def test_greedy_text_is_that_of_transformers(directory: Path, tmp_path: Path) -> None:
    """Token by token, and in blocks of one with the shifted read-out, whatever the threshold."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    document_id = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    prompts = [
        Prompt(i, f"text-{i}", np.array(tokenizer.encode(text, add_special_tokens=False)))
        for i, text in enumerate(PROMPTS)
    ]
    theirs: Any = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    wanted = []
    for prompt in prompts:
        context = torch.tensor([[document_id, *prompt.token_ids.tolist()]])
        out = theirs.generate(
            context,
            attention_mask=torch.ones_like(context),
            do_sample=False,
            max_new_tokens=NEW,
            eos_token_id=document_id,
            pad_token_id=document_id,
        )
        wanted.append(out[0, context.shape[1] :].tolist())
    del theirs
    assert len({token for ids in wanted for token in ids}) > NEW, "the text must vary"
    ours = load_hf(directory, document_id=document_id)
    metadata = {
        "mask_id": str(ours.config.vocab_size),
        "document_id": str(document_id),
        "requests": str(len(prompts)),
    }
    ones = block_config(0.5, extent=FixedExtent(length=1))
    for name, decoder in {"ar": AR, "blocks of one": ones}.items():
        with TraceWriter(tmp_path / name, metadata) as trace:
            samples = decode(
                decoder,
                model=ours,
                prompts=prompts,
                trace=trace,
                shift=True,
                new_tokens=NEW,
                seed=0,
            )
        assert [sample.token_ids.tolist() for sample in samples] == wanted, name
