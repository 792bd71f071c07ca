"""The books of a study that is not finished: ledger, MLflow, and a page of the cells that are.

The rules `ledger`, `report` and `mlflow` wait for every score, so a cell that cannot finish would
leave nothing on record. These books lie in `so-far/` of the report's directory, can be written at
any time, and give way to the report; no stage's work is touched.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from abf.artifacts import LEDGER, PlanDocument, read_table
from abf.errors import ArtifactError, ClusterError, LockError
from abf.files import lock
from abf.job import Job, plan_of
from abf.ledger.build import build_ledger
from abf.ledger.slurm import kept_records, scheduled_rows, slurm_rows
from abf.report.config import ReportConfig
from abf.report.page import build_report
from abf.seeing.at_work import QueueEntry, jobs_by_place, live_jobs
from abf.seeing.look import state_of
from abf.seeing.planned import Planned
from abf.seeing.rerun import Rerun
from abf.site import load_node
from abf.stages import SO_FAR
from abf.study import ingest_study, report_plan
from abf.track.mlflow_costs import Row, by_place
from abf.track.outcomes import attempt_outcomes

MOST = 10
"""Missing cells that are printed; the page names them all."""


def write_so_far(path: Path) -> None:
    """Bring ledger, MLflow and page of a study up to date with what there is.

    Args:
        path: directory of the study's report, `results/report/STUDY`.

    Raises:
        ArtifactError: there is no plan, a record of an attempt is damaged, or MLflow or the page
            could not be written; the other one was, nevertheless.
        LockError: another process writes these books.
    """
    job = Job.open("report", path)
    out = job.directory / SO_FAR
    with lock(out, "abf report --so-far"):
        _write_ledger(plan_of(job), job.results, out)
        faults = []
        for write in (_fill_mlflow, _write_page):
            try:
                write(job, out)
            except (ArtifactError, LockError) as error:
                faults.append(str(error))
        if faults:
            raise ArtifactError("; ".join(faults))


def end_with_books(report: Path) -> None:
    """What a driver does that ends with an error: write the books in a process of its own.

    Whatever becomes of that is a line more on the screen and changes nothing of the study's end.
    """
    command = [sys.executable, "-m", "abf.cli", "report", str(report), "--so-far"]
    print("bringing the books up to date (Ctrl-C leaves them)", file=sys.stderr, flush=True)
    # A session of its own: Ctrl-C reaches us alone, and we stop it in the way it takes quietly.
    child = subprocess.Popen(command, start_new_session=True)
    try:
        code = child.wait()
    except KeyboardInterrupt:
        child.terminate()
        code = child.wait()
    if code < 0:
        print(f"abf report: ended by signal {-code}", file=sys.stderr, flush=True)


def _write_ledger(plan: PlanDocument, results: Path, out: Path) -> None:
    places, node = plan["stages"], load_node()
    try:
        rows = scheduled_rows(results, places, node=node)
    except ClusterError as error:
        said = str(error).splitlines()[0]
        print(f"node-hours are as of the last ledger: {said}", file=sys.stderr, flush=True)
        kept = kept_records(results).values()
        rows = slurm_rows(kept, places, results, full_billing=node.billing)
    directories = [results / place for place in places]
    counts = build_ledger(results, directories, out, scheduled=rows)
    print(
        f"ledger so far: {out / 'ledger.parquet'}, {counts['attempts']} attempts, "
        f"{counts['core_hours']:.4g} core-hours, {counts['node_hours']:.4g} node-hours",
        flush=True,
    )


def _fill_mlflow(job: Job, out: Path) -> None:
    rows = read_table(out / "ledger.parquet", LEDGER).to_pylist()
    print(f"MLflow so far: {ingest_study(plan_of(job), job.results, rows)}", flush=True)


def _write_page(job: Job, out: Path) -> None:
    (out / "index.html").unlink(missing_ok=True)
    shutil.rmtree(out / "figures", ignore_errors=True)
    plan = plan_of(job)
    rows = read_table(out / "ledger.parquet", LEDGER).to_pylist()
    missing, cells = missing_cells(plan, job.results, rows), len(plan["cells"])
    if len(missing) < cells:
        config = job.setting("report", ReportConfig)
        build_report(
            report_plan(plan, job.results, ledger=out, config=config, missing=missing), out
        )
        print(f"report so far: {out / 'index.html'}")
    print(f"{cells - len(missing)} of {cells} cells are finished")
    for name, reason in list(missing.items())[:MOST]:
        print(f"  {name}: {reason}")
    if len(missing) > MOST:
        print(f"  and {len(missing) - MOST} more")


def missing_cells(plan: PlanDocument, results: Path, rows: Iterable[Row]) -> dict[str, str]:
    """Cells whose scores are not there, or would be made again; why, by name.

    Args:
        rows: the study's ledger so far.
    """
    attempts = by_place(rows)
    planned = Planned(results, (plan,), None)
    rerun, queue = Rerun(planned), jobs_by_place(planned, live_jobs(results, []))
    found = {}
    for cell in plan["cells"]:
        chain = rerun.above(cell["score"]) | {cell["score"]}
        shown = {cell["train"], cell["score"], cell["packed"], *cell["decodes"].values()}
        left = [
            place
            for place in planned.places
            if place in chain
            and (rerun.repeats(place) or (place in shown and not rerun.standing(place).declared))
        ]
        if left:
            found[cell["name"]] = _reason(left, results, queue, attempts)
    return found


def _reason(
    left: Sequence[str],
    results: Path,
    queue: Mapping[str, QueueEntry],
    attempts: Mapping[str, Sequence[Row]],
) -> str:
    """Why what is left of a cell is left: all that failed, else what is at work, else the first."""
    told: dict[str, list[str]] = {}
    for place in left:
        outcomes, known = attempt_outcomes(results / place), attempts.get(place, ())
        state, reason = state_of(results / place, place, outcomes, queue.get(place))
        if state == "done":
            reason = "to be declared, or made again from other inputs"
        elif known and state == "to do":
            # Interrupted, or ended by the scheduler before our code could write that down.
            reason = f"{known[-1]['state']} {known[-1]['reason']}".strip()
        number = f" (attempt {len(known)})" if known else ""
        text = f"{place}: {state}{number}: {' '.join(reason.split())}"
        told.setdefault(state, []).append(text.removesuffix(": "))
    first = next((told[state] for state in ("failed", "running", "waiting") if state in told), None)
    return "; ".join(first or next(iter(told.values()))[:1])
