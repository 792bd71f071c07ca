"""The report: one self-contained HTML page with its figures, and the same figures as SVG files.

Nothing on the page is computed here that is not a table, a figure or a generation of the other
modules; model text reaches the page only through the template's escaping.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from abf.artifacts import DOCUMENT_SCORES, LEDGER, SCORES, read_table
from abf.data.tokenizer import load_tokenizer
from abf.errors import ArtifactError
from abf.files import write_text
from abf.report import figures, svg, text
from abf.report.bases import base_names, base_scores
from abf.report.blocks import read_block_lengths
from abf.report.costs import SHARED, Cost, costs, owners, side_by_side, total
from abf.report.coverage import coverage, heldout_documents
from abf.report.curves import (
    TITLES,
    Training,
    training_of_bases,
    training_of_cells,
    training_panels,
)
from abf.report.generations import read_generations
from abf.report.inputs import ReportCell, ReportPlan
from abf.report.metrics import (
    AR,
    BASE,
    BOUND,
    COMPARED,
    DECODING,
    HEADLINE,
    NOISE,
    NOISY,
    TPF,
    describe,
)
from abf.report.tables import CellScores, Estimate, Key, admit, differences, estimates

Found = Mapping[tuple[str, Key], Estimate]


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
    names = base_names(plan.cells)
    bases = list(names.values())
    scores = [_read_scores(cell) for cell in plan.cells]
    scores = [*base_scores(plan.cells, scores, names), *scores]
    ledger = read_table(plan.ledger / "ledger.parquet", LEDGER).to_pylist()
    planned = [*plan.cells, *(missing.cell for missing in plan.missing)]
    spent = costs(ledger, owners(planned, names))
    payers = [*bases, *dict.fromkeys(cell.arm for cell in planned), SHARED]
    cfg = plan.config
    found = estimates(scores, confidence=cfg.confidence, resamples=cfg.bootstrap)
    entered, left_out = admit(found, lambda arm: total(spent, arm).attempts > 0)
    taught = training_of_bases(names)
    drawn = _figures(plan, entered, arms, taught)
    for name, drawing in drawn.items():
        write_text(out / "figures" / f"{name}.svg", drawing)
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
        palette={"light": svg.PALETTE, "dark": svg.DARK_PALETTE},
        colour={arm: f"var(--c{i % len(svg.PALETTE)})" for i, arm in enumerate(arms)},
        seeds=sorted({cell.seed for cell in plan.cells}),
        headline=_headline(entered, [*bases, *arms], spent),
        bases=bases,
        scored=_scored(plan, scores),
        gaps=[
            (
                gap,
                describe(gap.key.metric),
                text.cost_text(total(spent, gap.arm, gap.baseline)),
                text.difference_text(gap, cfg.confidence),
            )
            for gap in gaps
        ],
        shown=sum(gap.separated(cfg.confidence) for gap in gaps),
        decoding=_decoding(entered, arms, spent),
        beside=side_by_side(ledger, "decode"),
        taught=taught,
        trained=training_of_cells(plan.cells),
        no_bound=list(dict.fromkeys(cell.arm for cell in plan.cells if not cell.bound)),
        everything=[
            (e, text.estimate_text(e), text.cost_text(total(spent, e.arm)))
            for e in entered.values()
        ],
        left_out=left_out,
        figures={name: svg.inline(drawing, name) for name, drawing in drawn.items()},
        generations=generations,
        spent=spent,
        sums=[total(spent, payer) for payer in payers if total(spent, payer).rows],
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


# --- tables -------------------------------------------------------------------------------------


def _headline(found: Found, arms: Sequence[str], spent: Sequence[Cost]) -> list[dict[str, Any]]:
    """A table for every task (and version) that measures bits per byte of held-out text."""
    tasks = dict.fromkeys((k.task, k.task_version) for _, k in found if k.metric in COMPARED)
    lines = [(arm, "") for arm in arms]
    return [_table(found, task, version, HEADLINE, lines, spent) for task, version in tasks]


def _scored(plan: ReportPlan, scores: Sequence[CellScores]) -> dict[str, Any]:
    """Task -> documents that every cell scored, of those held out, by source."""
    heldout = heldout_documents(plan.cells[0].pack)
    tasks = dict.fromkeys(row["task"] for cell in scores for row in cell.documents)
    found = {}
    for task in tasks:
        of_cells = [{r["document"] for r in cell.documents if r["task"] == task} for cell in scores]
        found[task] = coverage(set.intersection(*filter(None, of_cells)), heldout)
    return found


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
    rows = []
    for at, (arm, name) in enumerate(lines):
        noise = found.get((arm, Key(task, version, name, NOISE)))
        cells = {m: by_metric[m][at] for m in measured}
        texts = [text.estimate_text(e, noise if m in NOISY else None) for m, e in cells.items()]
        rows.append(_row(arm, [*cells.values()], spent) | {"cells": texts, "decoder": name})
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
        "seeds": max((len(cell.values) for cell in present), default=0),
        "documents": "\N{EN DASH}".join(str(n) for n in (documents[:1] + documents[1:][-1:])),
        "cost": text.cost_text(total(spent, arm)),
    }


# --- figures and generations --------------------------------------------------------------------


def _figures(
    plan: ReportPlan, found: Found, arms: Sequence[str], taught: Sequence[Training]
) -> dict[str, str]:
    """Figure name -> SVG, those that there is something to show for."""
    drawn = {}
    bits = {
        metric: [
            e for (arm, k), e in found.items() if k.metric == metric and e.values and arm in arms
        ]
        for metric in COMPARED
    }
    bits = {metric: members for metric, members in bits.items() if members}
    if bits:
        levels = [
            e.mean for (arm, k), e in found.items() if k.metric == AR and arm not in arms and e.mean
        ]
        drawn["bits_per_byte"] = figures.bits_figure(bits, arms, base=levels)
    pairs = [
        (e, found[arm, quality])
        for (arm, key), e in found.items()
        if key.metric == TPF and (arm, quality := key._replace(metric=BASE)) in found
    ]
    if pairs:
        decoders = list(dict.fromkeys(x.key.decoder for x, _ in pairs))
        drawn["quality_parallelism"] = figures.parallelism_figure(pairs, arms, decoders)
    panels = training_panels(plan.cells)
    if panels:
        titled = {TITLES[name]: by_arm for name, by_arm in panels.items()}
        levels = {TITLES["ar"]: [base.loss for base in taught]}
        drawn["training"] = figures.training_figure(titled, arms, levels=levels)
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
