"""The command that plans a run and accounts for it. Its imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from ncsn.cli.failures import ReportingCommand
from ncsn.cli.options import experiment_options, json_option

if TYPE_CHECKING:
    from ncsn.cli.inputs import Target


@click.command("plan", cls=ReportingCommand, short_help="Say what a run will take before it starts.")
@experiment_options
@click.option("--prices", "prices_uri", metavar="PATH|URI", help="A price table; default: the package's prices.yaml.")
@click.option("--actual", is_flag=True, help="Rehearse nothing: show what the run has taken beside its plan.")
@json_option
def plan_command(
    *,
    config_uri: str | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    prices_uri: str | None,
    actual: bool,
    as_json: bool,
) -> None:
    """Say what a run will take: hours, memory, storage, money and energy of each step.

    Rehearses every step on a few images, in about a minute, in a store of its own.
    """
    from ncsn.cli.inputs import resolve
    from ncsn.cli.output import console_on
    from ncsn.cli.plan_view import print_ledger, print_plan

    target = resolve(config_uri, overrides=overrides, run=run_name)
    if actual:
        from ncsn.runs.costs import ledger

        found = ledger(target.config, run=target.run)
    else:
        found = _rehearsed(target, prices_uri)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        (print_ledger if actual else print_plan)(console_on(sys.stdout), found)


def _rehearsed(target: Target, prices_uri: str | None) -> dict[str, Any]:
    from ncsn.cli.output import quiet_libraries
    from ncsn.cli.supervisor import work_folder
    from ncsn.runs.costs import load_prices
    from ncsn.runs.folder import run_folder

    prices = load_prices(prices_uri)
    log = work_folder(run_folder(target.config, target.run)) / "plan.log"
    with quiet_libraries(log) as console:
        console.print(f"log    {log}\nrehearsal", soft_wrap=True)
        from ncsn.tools import trial_run

        return trial_run.run(
            target.config, run=target.run, prices=prices, report=lambda part: console.print(f"       {part}")
        )
