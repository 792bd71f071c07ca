"""The report: one self-contained HTML page with its figures, and the same figures as SVG files.

Nothing on the page is computed here that is not a table, a figure or a generation of the other
modules; model text reaches the page only through the template's escaping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from abf.artifacts import DOCUMENT_SCORES, LEDGER, METRICS, SCORES, read_table
from abf.data.tokenizer import load_tokenizer
from abf.errors import ArtifactError
from abf.files import write_text
from abf.report import figures, text
from abf.report.blocks import read_block_lengths
from abf.report.costs import SHARED, Cost, costs, total
from abf.report.generations import read_generations
from abf.report.inputs import ReportCell, ReportPlan
from abf.report.metrics import BASE, BOUND, COMPARED, DECODING, HEADLINE, TPF, describe
from abf.report.tables import (
    CellScores,
    Estimate,
    Key,
    admit,
    differences,
    estimates,
)

Found = Mapping[tuple[str, Key], Estimate]

TRAINING_PANELS = {
    "nelbo": "Block bound (noisy stream)",
    "ar": "AR loss (clean stream)",
    "length": "Block length",
}
"""Journal metrics that get a panel, if any arm has them."""


def build_report(plan: ReportPlan, out: Path) -> dict[str, Any]:
    """Write `out`/index.html and `out`/figures/*.svg.

    Returns:
        counts: arms, cells, estimates, left_out, figures, generations, bytes.

    Raises:
        ArtifactError: there is no cell, or an input is missing or damaged; names it.
    """
    if not plan.cells:
        raise ArtifactError(f"study {plan.study} has no cell: there is nothing to report")
    arms = list(dict.fromkeys(cell.arm for cell in plan.cells))
    scores = [_read_scores(cell) for cell in plan.cells]
    ledger = read_table(plan.ledger / "ledger.parquet", LEDGER).to_pylist()
    spent = costs(ledger, _owners(plan.cells))
    cfg = plan.config
    found = estimates(scores, confidence=cfg.confidence, resamples=cfg.bootstrap)
    entered, left_out = admit(found, lambda arm: total(spent, arm).attempts > 0)
    drawn = _figures(plan, entered, arms)
    for name, svg in drawn.items():
        write_text(out / "figures" / f"{name}.svg", svg)
    generations = _generations(plan, arms)
    compared = dict.fromkeys(key for _, key in entered if key.metric in COMPARED)
    gaps = [
        gap
        for gap in differences(scores, compared, confidence=cfg.confidence, resamples=cfg.bootstrap)
        if (gap.arm, gap.key) in entered and (gap.baseline, gap.key) in entered
    ]
    page = _render(
        plan=plan,
        arms=arms,
        confidence=f"{100 * cfg.confidence:g} %",
        palette={"light": figures.PALETTE, "dark": figures.DARK_PALETTE},
        colour={arm: f"var(--c{i % len(figures.PALETTE)})" for i, arm in enumerate(arms)},
        seeds=sorted({cell.seed for cell in plan.cells}),
        headline=_headline(entered, arms, spent),
        gaps=[
            (
                gap,
                describe(gap.key.metric),
                text.cost_text(total(spent, gap.arm, gap.baseline)),
                text.difference_text(gap),
            )
            for gap in gaps
        ],
        decoding=_decoding(entered, arms, spent),
        everything=[
            (e, text.estimate_text(e), text.cost_text(total(spent, e.arm)))
            for e in entered.values()
        ],
        left_out=left_out,
        figures={name: figures.inline(svg, name) for name, svg in drawn.items()},
        generations=generations,
        spent=spent,
        sums=[total(spent, arm) for arm in [*arms, SHARED] if total(spent, arm).rows],
        total=total(spent),
        text=text,
    )
    write_text(out / "index.html", page)
    return {
        "arms": len(arms),
        "cells": len(plan.cells),
        "estimates": len(entered),
        "left_out": len(left_out),
        "figures": len(drawn),
        "generations": sum(len(g) for group in generations.values() for g in group.values()),
        "bytes": len(page.encode()),
    }


def _read_scores(cell: ReportCell) -> CellScores:
    return CellScores(
        arm=cell.arm,
        seed=cell.seed,
        scores=read_table(cell.score / "scores.parquet", SCORES).to_pylist(),
        documents=read_table(cell.score / "documents.parquet", DOCUMENT_SCORES).to_pylist(),
    )


def _owners(cells: Sequence[ReportCell]) -> dict[tuple[str, str], str]:
    """(rule, run key) -> arm, for directories that one arm alone uses."""
    users: dict[tuple[str, str], set[str]] = {}
    for cell in cells:
        own = [("pack", cell.pack), ("train", cell.train), ("score", cell.score)]
        own += [("decode", directory) for directory in cell.decodes.values()]
        for stage, directory in own:
            users.setdefault((stage, _key(stage, directory)), set()).add(cell.arm)
    order = list(dict.fromkeys(cell.arm for cell in cells))
    single = {name: next(iter(arms)) for name, arms in users.items() if len(arms) == 1}
    return dict(sorted(single.items(), key=lambda item: order.index(item[1])))


def _key(stage: str, directory: Path) -> str:
    """`{key}` of `results/{stage}/{key}`, as the ledger has it; a key may have several parts."""
    parts = directory.parts
    at = len(parts) - parts[::-1].index(stage) if stage in parts else len(parts) - 1
    return "/".join(parts[at:])


# --- tables -------------------------------------------------------------------------------------


def _headline(found: Found, arms: Sequence[str], spent: Sequence[Cost]) -> list[dict[str, Any]]:
    """A table for every task (and version) that measures bits per byte of held-out text."""
    tasks = dict.fromkeys((k.task, k.task_version) for _, k in found if k.metric in COMPARED)
    lines = [(arm, "") for arm in arms]
    return [_table(found, task, version, HEADLINE, lines, spent) for task, version in tasks]


def _decoding(found: Found, arms: Sequence[str], spent: Sequence[Cost]) -> list[dict[str, Any]]:
    """A table for every generative task: an arm and a decoder a row."""
    tables = []
    for task, version in dict.fromkeys((k.task, k.task_version) for _, k in found if k.decoder):
        here = [(arm, key) for arm, key in found if key[:2] == (task, version)]
        decoders = list(dict.fromkeys(key.decoder for _, key in here))
        present = {(arm, key.decoder) for arm, key in here}
        lines = [(arm, name) for name in decoders for arm in arms if (arm, name) in present]
        tables.append(_table(found, task, version, DECODING, lines, spent))
    return tables


def _table(
    found: Found,
    task: str,
    version: int,
    metrics: Sequence[str],
    lines: Sequence[tuple[str, str]],
    spent: Sequence[Cost],
) -> dict[str, Any]:
    """A row for every (arm, decoder), a column for every metric that was measured at all."""
    by_metric = {
        metric: [found.get((arm, Key(task, version, name, metric))) for arm, name in lines]
        for metric in metrics
    }
    measured = [m for m, cells in by_metric.items() if any(c and c.values for c in cells)]
    rows = [
        _row(arm, [by_metric[metric][at] for metric in measured], spent) | {"decoder": name}
        for at, (arm, name) in enumerate(lines)
    ]
    return {
        "task": task,
        "version": version,
        "columns": [_column(metric, by_metric[metric]) for metric in measured],
        "rows": rows,
        "unmeasured": [_column(m, by_metric[m]) for m in metrics if m not in measured],
    }


def _column(metric: str, cells: Sequence[Estimate | None]) -> dict[str, str]:
    present = [cell for cell in cells if cell is not None]
    notes = dict.fromkeys(
        note.removeprefix(f"{text.NOT_MEASURED}: ") for cell in present for note in cell.notes
    )
    return {
        **describe(metric, generated=any(e.key.decoder for e in present))._asdict(),
        "unit": present[0].unit if present else "",
        "note": "; ".join(notes),
    }


def _row(arm: str, cells: Sequence[Estimate | None], spent: Sequence[Cost]) -> dict[str, Any]:
    present = [cell for cell in cells if cell is not None and cell.values]
    documents = sorted({cell.documents for cell in present if cell.documents})
    return {
        "arm": arm,
        "cells": [text.estimate_text(cell) for cell in cells],
        "seeds": max((len(cell.values) for cell in present), default=0),
        "documents": "\N{EN DASH}".join(str(n) for n in (documents[:1] + documents[1:][-1:])),
        "cost": text.cost_text(total(spent, arm)),
    }


# --- figures and generations --------------------------------------------------------------------


def _figures(plan: ReportPlan, found: Found, arms: Sequence[str]) -> dict[str, str]:
    """Figure name -> SVG, those that there is something to show for."""
    drawn = {}
    bits = {
        metric: [e for e in found.values() if e.key.metric == metric and e.values]
        for metric in COMPARED
    }
    bits = {metric: members for metric, members in bits.items() if members}
    if bits:
        reference = [e.mean for (_, k), e in found.items() if k.metric == BASE and not k.decoder]
        base = reference[0] if len(set(reference)) == 1 else None
        drawn["bits_per_byte"] = figures.bits_figure(bits, arms, base=base)
    pairs = [
        (e, found[arm, quality])
        for (arm, key), e in found.items()
        if key.metric == TPF and (arm, quality := key._replace(metric=BASE)) in found
    ]
    if pairs:
        decoders = list(dict.fromkeys(x.key.decoder for x, _ in pairs))
        drawn["quality_parallelism"] = figures.parallelism_figure(pairs, arms, decoders)
    panels = _training_panels(plan.cells)
    if panels:
        drawn["training"] = figures.training_figure(panels, arms)
    packs = {cell.arm: cell.pack for cell in reversed(plan.cells)}
    # An AR arm is packed like any other, but its blocks mean nothing to it.
    with_blocks = {arm for (arm, key), e in found.items() if key.metric == BOUND and e.values}
    lengths = {
        arm: read_block_lengths(packs[arm] / "packed" / "train.arrow")
        for arm in arms
        if arm in with_blocks or not with_blocks
    }
    drawn["block_lengths"] = figures.block_length_figure(lengths, arms)
    return drawn


def _training_panels(
    cells: Sequence[ReportCell],
) -> dict[str, dict[str, dict[int, figures.Curve]]]:
    panels: dict[str, dict[str, dict[int, figures.Curve]]] = {}
    for cell in cells:
        table = read_table(cell.train / "metrics.parquet", METRICS)
        names = np.asarray(table["name"].to_pylist(), dtype=object)
        tokens, values = table["tokens"].to_numpy(), table["value"].to_numpy()
        for name, title in TRAINING_PANELS.items():
            mine = names == name
            if mine.any():
                order = np.argsort(tokens[mine], kind="stable")
                curve = (tokens[mine][order].astype(float), values[mine][order])
                panels.setdefault(title, {}).setdefault(cell.arm, {})[cell.seed] = curve
    return {title: panels[title] for title in TRAINING_PANELS.values() if title in panels}


def _generations(plan: ReportPlan, arms: Sequence[str]) -> dict[str, dict[str, list[Any]]]:
    """Arm -> decoder -> generations of the arm's first seed."""
    if not plan.config.generations:
        return {}
    tokenizer = load_tokenizer(plan.tokenizer)
    first = {cell.arm: cell for cell in reversed(plan.cells)}
    return {
        arm: {
            name: read_generations(directory, plan.config.generations, tokenizer)
            for name, directory in first[arm].decodes.items()
        }
        for arm in arms
        if first[arm].decodes
    }


def _render(**context: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("abf.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("page.html.j2").render(**context)
