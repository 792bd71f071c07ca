"""How MLflow's pages open on a study: the experiment's description and its saved views.

Left alone, MLflow opens on traces, folds the cells away under their grid, and shows neither
attempts nor costs. A saved view is an experiment tag that the UI reads (menu "Views", or the
address); these are written once and always the same.
"""

from __future__ import annotations

import json
from typing import Any

from abf.track.mlflow_costs import GROUP

CELLS, GRIDS = "abf-cells", "abf-grids"
"""Keys of the views in addresses."""
_COLUMNS = {
    "tags.`abf.attempt_states`": 270,
    f"metrics.`{GROUP}attempts`": 105,
    f"metrics.`{GROUP}failed_attempts`": 150,
    f"metrics.`{GROUP}node_hours`": 130,
    f"metrics.`{GROUP}gpu_hours`": 130,
    f"metrics.`{GROUP}core_hours`": 130,
    f"metrics.`{GROUP}energy_kwh`": 130,
    "metrics.`train/loss`": 100,
}
"""What both views show beside name, state and duration, with its width in pixels; a column that no
run has stays away."""
_FIRST = {"1": 73, "attributes.`Run Name`": 190, "runDateAndNestInfo": 150, "duration": 85}
"""MLflow's own columns before them: tick box, name, when and how it ended, how long."""
_VIEWS: dict[str, tuple[str, dict[str, Any]]] = {
    CELLS: (
        "Cells: attempts and costs",
        {
            "searchFilter": 'tags.`abf.kind` = "cell"',
            "orderByKey": "tags.`mlflow.runName`",
            "orderByAsc": True,
        },
    ),
    # Ordered by time is the one order in which MLflow nests children.
    GRIDS: ("Grids, cells below them", {"orderByKey": "attributes.start_time"}),
}
_CREATED = 1_767_225_600_000
"""Of every view, in milliseconds; no clock, so that the same files give the same store."""


def experiment_tags() -> dict[str, str]:
    """Tags of a study's experiment."""
    widths = _FIRST | _COLUMNS
    table = {
        "selectedColumns": list(_COLUMNS),
        "columnOrder": list(widths),
        "columnWidths": widths,
    }
    views = {
        f"mlflow.sharedViewState.{key}": json.dumps(
            {
                "name": name,
                "createdAt": _CREATED,
                "updatedAt": _CREATED,
                "state": json.dumps(table | state),
            }
        )
        for key, (name, state) in _VIEWS.items()
    }
    return {
        # The page then opens on runs and curves instead of traces and prompts.
        "mlflow.experimentKind": "custom_model_development",
        "mlflow.note.content": "Filled from files; change those, not this. Parent runs are grids, "
        "child runs their cells (arm and seed).",
        **views,
    }


def runs_page(experiment: str, view: str = CELLS) -> str:
    """Path below MLflow's address that shows the runs of a study in one of the saved views."""
    return (
        f"/#/experiments/{experiment}/runs?workflowType=machine_learning&viewStateShareKey={view}"
    )
