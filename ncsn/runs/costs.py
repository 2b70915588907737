"""Prices, the cost of a step, and the plan of a run next to its actual costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib import resources
from typing import Any

import yaml

from ncsn import storage
from ncsn.config import NOT_YAML, Config
from ncsn.errors import UserError
from ncsn.runs.folder import RunFolder, run_folder
from ncsn.runs.records import read_result, spent_seconds
from ncsn.runs.steps import STEPS, STEPS_BY_WORKERS


@dataclass(frozen=True)
class Prices:
    """The price table; `prices.yaml` explains each price."""

    currency: str
    cpu_core_hour: float
    gpu_hour: float
    storage_gb_month: float
    watts_per_cpu_core: float
    watts_per_gpu: float
    power_overhead: float


@dataclass(frozen=True)
class Cost:
    """The cost of some seconds on reserved cores and GPUs."""

    seconds: float
    cpu_hours: float
    gpu_hours: float
    money: float
    kwh: float


def load_prices(uri: str | None = None) -> Prices:
    """The price table at `uri`, by default the one in the package."""
    own = resources.files("ncsn").joinpath("prices.yaml")
    content, origin = (storage.read_bytes(storage.absolute(uri)), uri) if uri else (own.read_bytes(), own.name)
    try:
        table = yaml.safe_load(content.decode())
    except NOT_YAML as error:
        raise UserError(origin, f"not valid YAML: {error}") from None
    names = [field.name for field in fields(Prices)]
    if not isinstance(table, dict) or set(table) != set(names):
        raise UserError(origin, f"expected exactly these prices: {', '.join(names)}")
    for name in names[1:]:
        value = table[name]
        if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise UserError(f"{origin}:{name}", "not a number of at least 0", value=value)
    return Prices(**table)


def cost(seconds: float, *, cores: int, gpus: int, prices: Prices) -> Cost:
    """The cost of `seconds` on some cores and GPUs."""
    cpu_hours, gpu_hours = cores * seconds / 3600, gpus * seconds / 3600
    watt_hours = cpu_hours * prices.watts_per_cpu_core + gpu_hours * prices.watts_per_gpu
    return Cost(
        seconds=seconds,
        cpu_hours=cpu_hours,
        gpu_hours=gpu_hours,
        money=cpu_hours * prices.cpu_core_hour + gpu_hours * prices.gpu_hour,
        kwh=watt_hours * prices.power_overhead / 1000,
    )


def cost_of(config: Config, step: str, seconds: float, prices: Prices) -> Cost:
    """The cost of `seconds` of a step, with the cores and GPUs that it reserves."""
    compute = config.compute
    workers = compute.max_workers if step in STEPS_BY_WORKERS else 1
    gpus = workers if compute.use_gpu and step in STEPS_BY_WORKERS else 0
    return cost(seconds, cores=workers * compute.cpus_per_worker, gpus=gpus, prices=prices)


def total(costs: Mapping[str, Cost]) -> Cost:
    """The sum over all steps."""
    return Cost(**{field.name: sum(getattr(cost, field.name) for cost in costs.values()) for field in fields(Cost)})


def read_plan(folder: RunFolder) -> dict[str, Any] | None:
    """The plan of a run as plain values, or None if there is none."""
    plan: dict[str, Any] | None = storage.find_json(folder.plan)
    return plan


def prices_of(plan: Mapping[str, Any] | None) -> Prices:
    """The prices of a plan, by default those in the package."""
    return Prices(**plan["prices"]) if plan else load_prices()


def step_costs(
    config: Config, plan: dict[str, Any] | None, *, step: str, seconds: float
) -> tuple[dict[str, float], dict[str, float]]:
    """MLflow metrics of the step's run, `cost/...`, and of the pipeline's, `cost/<step>_seconds` and `plan/...`."""
    prices = prices_of(plan)
    of_step = {f"cost/{name}": value for name, value in asdict(cost_of(config, step, seconds, prices)).items()}
    planned = {f"plan/{step}_seconds": plan["steps"][step]["seconds"]} if plan and step in plan["steps"] else {}
    return of_step, planned | {f"cost/{step}_seconds": seconds}


def account(config: Config, *, run: str) -> dict[str, Any]:
    """As plain values `plan`, or None; `actual`: the `steps` so far and their `total`; `prices`."""
    folder = run_folder(config, run)
    plan = read_plan(folder)
    prices = prices_of(plan)
    spent = {step: spent_seconds(folder, step) for step in STEPS}
    costs = {step: cost_of(config, step, seconds, prices) for step, seconds in spent.items() if seconds is not None}
    steps = {step: asdict(cost) | _speed(folder, step) for step, cost in costs.items()}
    return {"plan": plan, "actual": {"steps": steps, "total": asdict(total(costs))}, "prices": asdict(prices)}


def _speed(folder: RunFolder, step: str) -> dict[str, float]:
    record = read_result(folder, step)
    speed = record.result.get("images_per_second") if record else None
    return {"images_per_second": speed} if speed else {}  # the last call may have made no image
