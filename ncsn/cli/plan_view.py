"""Plans and ledgers in a person's words."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from ncsn.report.words import duration


def print_plan(console: Console, plan: Mapping[str, Any]) -> None:
    """Each step's time and cost, then memory and storage."""
    currency = plan["prices"]["currency"]
    table = _table(currency)
    for step, cost in plan["steps"].items():
        table.add_row(step, duration(cost["seconds"]), *_costs(cost))
    table.add_row("start", duration(plan["start_seconds"]), "", "", "", "")
    whole = plan["total"]
    table.add_row("[bold]all", f"[bold]{duration(whole['seconds'] + plan['start_seconds'])}", *_costs(whole))
    console.print(table)
    memory, store = plan["memory"], plan["storage"]
    verdict = "fits" if memory["fits"] else "[bold]does not fit[/]: lower train.batch_size or compute.num_workers"
    console.print(
        f"memory   {memory['worker_gb']:.2f} GB per worker, {memory['workers_gb']:.2f} of "
        f"{memory['machine_gb']:.1f} GB: {verdict}",
        soft_wrap=True,
    )
    if pods := plan["pods"]:
        console.print(
            f"pods     {pods['count']} of {pods['workers']} workers: {pods['cpus']} CPUs, {pods['gpus']} GPUs and "
            f"{pods['memory_gb']:.1f} GB each",
            soft_wrap=True,
        )
    console.print(
        f"storage  {store['store_gb']:.3f} GB: images {store['dataset_gb']:.3f}, checkpoints "
        f"{store['checkpoints_gb']:.3f}, samples {store['samples_gb']:.3f}; {store['money_per_month']:.4f} "
        f"{currency} a month; {store['node_cache_gb']:.3f} GB in each node's cache",
        soft_wrap=True,
    )
    rates = plan["rates"]
    console.print(
        f"rates    {1 / rates['train_image']:,.0f} training images/s; one network evaluation of a batch of samples "
        f"{1000 * rates['sample_evaluation']:,.1f} ms",
        soft_wrap=True,
    )


def print_ledger(console: Console, ledger: Mapping[str, Any]) -> None:
    """What each step took, beside its plan."""
    plan, actual = ledger["plan"], ledger["actual"]
    table = _table(ledger["prices"]["currency"])
    table.add_column("planned", justify="right")
    table.add_column("actual / planned", justify="right")
    for step, cost in actual["steps"].items():
        table.add_row(step, duration(cost["seconds"]), *_costs(cost), *_beside(plan, step, cost["seconds"]))
    if actual["steps"]:
        table.add_row("[bold]all", f"[bold]{duration(actual['total']['seconds'])}", *_costs(actual["total"]), "", "")
        console.print(table)
    else:
        console.print("no step of this run has been at work yet")


def _table(currency: str) -> Table:
    table = Table("step", box=SIMPLE_HEAD)
    for column in ("time", "CPU hours", "GPU hours", currency, "kWh"):
        table.add_column(column, justify="right")
    return table


def _costs(cost: Mapping[str, float]) -> list[str]:
    return [f"{cost[name]:,.3g}" for name in ("cpu_hours", "gpu_hours", "money", "kwh")]


def _beside(plan: Mapping[str, Any] | None, step: str, seconds: float) -> list[str]:
    if plan is None or step not in plan["steps"]:
        return ["", ""]
    planned = plan["steps"][step]["seconds"]
    return [duration(planned), f"{seconds / planned:.2f}"]
