"""The commands that work on a finished run. Imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

from ncsn.cli.options import (
    ReportingCommand,
    backend_options,
    experiment_options,
    input_options,
    json_option,
    lease_option,
)

if TYPE_CHECKING:
    from ncsn.cli.target import Experiment


@click.command("select", cls=ReportingCommand, short_help="Find the best checkpoint of a run by samples of each.")
@experiment_options
@input_options("select")
@click.option("--only-choose", is_flag=True, help="Stop after the choice.")
@lease_option
@backend_options
@json_option
def select_command(*, experiment: Experiment, only_choose: bool, as_json: bool, **given: str | None) -> None:
    """Score every kept checkpoint, and every average that there is, by a few samples; then use the best one.

    The section select of the config says how. The best one is sampled with sampling.seed, evaluated and registered.
    Training keeps checkpoints for this with train.keep_checkpoints=all or train.keep_every_images.
    """
    from ncsn.cli.execute import select_best

    only_choose = only_choose or given.get("lease") is not None  # the launcher does the rest
    select_best(experiment.resolve(), given=given, as_json=as_json, only_choose=only_choose)
