"""What a run will take, and what it took, beside each other in `<run>/plan.json` and in the results of its steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from ncsn import storage
from ncsn.config import Config
from ncsn.planning import estimate
from ncsn.runs.costs import PLAN, Prices, load_prices
from ncsn.runs.folder import run_folder


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
