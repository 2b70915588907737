"""What a step took, as metrics of its MLflow run and, beside the plan, of the run of the whole pipeline."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from ncsn.runs.costs import PLAN
from ncsn.tracking.lookup import set_tags

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient


PLANNED = "ncsn.planned_at"


def log_plan(client: MlflowClient, parent: Run, plan: dict[str, Any]) -> None:
    """Keep the plan with the run of the pipeline, once."""
    if parent.data.tags.get(PLANNED) != plan["made_at"]:
        client.log_text(parent.info.run_id, json.dumps(plan, indent=1), PLAN)
        set_tags(client, parent.info.run_id, {PLANNED: plan["made_at"]})
