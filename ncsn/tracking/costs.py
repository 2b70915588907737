"""What a step took, as metrics of its MLflow run and, beside the plan, of the run of the whole pipeline."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ncsn import storage
from ncsn.config import Config
from ncsn.planning import PLAN, Prices, cost_of, load_prices
from ncsn.tracking.lookup import set_tags

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

PLANNED = "ncsn.planned_at"


def read_plan(run_uri: str) -> dict[str, Any] | None:
    """The plan that was made for a run, as plain values; None if none was."""
    try:
        plan: dict[str, Any] = storage.read_json(storage.join(run_uri, PLAN))
    except FileNotFoundError:
        return None
    return plan


def prices_of(plan: Mapping[str, Any] | None) -> Prices:
    """The prices that a run was planned with, else those of the package."""
    return Prices(**plan["prices"]) if plan else load_prices()


def step_costs(
    config: Config, plan: dict[str, Any] | None, *, step: str, seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """Metrics of the step's run, `cost/<what>`, and of the pipeline's, `cost/<step>_seconds` beside `plan/...`."""
    prices = prices_of(plan)
    of_step = {f"cost/{name}": value for name, value in asdict(cost_of(config, step, seconds, prices)).items()}
    planned = {f"plan/{step}_seconds": plan["steps"][step]["seconds"]} if plan and step in plan["steps"] else {}
    return of_step, planned | {f"cost/{step}_seconds": seconds}


def log_plan(client: MlflowClient, parent: Run, plan: dict[str, Any]) -> None:
    """Keep the plan with the run of the pipeline, once."""
    if parent.data.tags.get(PLANNED) != plan["made_at"]:
        client.log_text(parent.info.run_id, json.dumps(plan, indent=1), PLAN)
        set_tags(client, parent.info.run_id, {PLANNED: plan["made_at"]})
