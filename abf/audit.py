"""`abf audit`: hold the event log of a decode to its rules and its model, and show a generation."""

from __future__ import annotations

from pathlib import Path

from abf.data.tokenizer import load_tokenizer
from abf.decode.audit import audit
from abf.decode.page import write_page
from abf.errors import ConfigError


def show_audit(
    log: Path,
    model: Path | None,
    steps: int,
    *,
    html: Path | None,
    request: int,
    tokenizer: Path | None,
) -> None:
    """Audit an event log, print what was found, and write one generation as a page."""
    if steps < 1:
        raise ConfigError(f"--steps {steps}: forward at least one step anew")
    for line in audit(log, model_dir=model, steps=steps).lines(log):
        print(line)
    if html is not None:
        if tokenizer is None:
            write_page(log, request, html, lambda ids: [f" {i}" for i in ids])
        else:
            write_page(log, request, html, load_tokenizer(tokenizer).token_strings)
        print(f"{html}: request {request}")
