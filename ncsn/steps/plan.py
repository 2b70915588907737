"""What a run will take, and what it took, beside each other in `<run>/plan.json` and in the results of its steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from typing import Any

from ncsn import storage
from ncsn.config import Config
from ncsn.planning import PLAN, Prices, cost_of, estimate, load_prices, total
from ncsn.steps.result import STEPS, RunFolder, run_folder, spent_seconds
from ncsn.tracking.costs import prices_of, read_plan


def run(config: Config, *, run: str, prices: Prices | None = None, report: Callable[[str], None]) -> dict[str, Any]:
    """Estimate the whole pipeline of `config` by a rehearsal on this machine or cluster, and keep it with the run.

    Args:
        config: The experiment.
        run: Name of the run that it is planned for; its name is not claimed.
        prices: What things cost; None takes the package's table.
        report: Called with the name of each part of the rehearsal.

    Returns:
        The plan as plain values, see `ncsn.planning.estimate`.

    Raises:
        NotFound: if the source's files are missing.
        UserError: for a config that the steps refuse.
    """
    from ncsn.steps.rehearsal import rehearse
    from ncsn.steps.small_experiment import count, settle

    folder = run_folder(config, run)
    config = settle(config)
    counts = count(config)
    rates = rehearse(config, counts, report=report)
    plan = {
        "run": run,
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        **estimate(config, counts, rates, prices or load_prices()),
    }
    storage.write_text(storage.join(folder.uri, PLAN), json.dumps(plan, indent=1))
    return plan


def ledger(config: Config, *, run: str) -> dict[str, Any]:
    """The plan of a run beside what its steps have taken so far.

    Returns:
        `plan`: as `run` gave it, or None; `actual`: `steps`, step -> `Cost` as plain values with `images_per_second`
        where the step counts images, and `total`; `prices`: those that both were reckoned with.
    """
    folder = run_folder(config, run)
    plan = read_plan(folder.uri)
    prices = prices_of(plan)
    costs = {
        step: cost_of(config, step, seconds, prices)
        for step, seconds in ((step, spent_seconds(folder, step)) for step in STEPS)
        if seconds is not None
    }
    steps = {step: asdict(cost) | _speed(folder, step) for step, cost in costs.items()}
    return {"plan": plan, "actual": {"steps": steps, "total": asdict(total(costs))}, "prices": asdict(prices)}


def _speed(folder: RunFolder, step: str) -> dict[str, float]:
    """Images per second of the last call, where the result says how many and how long."""
    try:
        result = storage.read_json(folder.step(step, "result.json"))["result"]
    except FileNotFoundError:
        return {}
    if "images_per_second" in result:
        return {"images_per_second": result["images_per_second"]}
    if "num_images" in result and result.get("seconds"):
        return {"images_per_second": result["num_images"] / result["seconds"]}
    return {}
