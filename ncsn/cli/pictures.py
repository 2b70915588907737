"""The commands that draw. Their imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import dataclasses
import json

import click

from ncsn.cli.failures import ReportingCommand
from ncsn.cli.options import json_option


@click.command("toy", cls=ReportingCommand, short_help="Make the paper's two-dimensional Figures 2 and 3.")
@click.option("--out", metavar="FOLDER", help="Folder or URI for the files; default: toy in the default store.")
@click.option("--seed", default=0, show_default=True, type=click.IntRange(0, 2**31 - 1), help="Of data and noise.")
@json_option
def toy_command(*, out: str | None, seed: int, as_json: bool) -> None:
    """Learn the score of a mixture of two Gaussians, and sample with plain and annealed Langevin dynamics.

    Plain Langevin dynamics leaves the two modes at half of the points each, annealed finds their weights.
    """
    from ncsn import storage
    from ncsn.cli.inputs import DEFAULT_ROOT
    from ncsn.cli.summary import describe_toy
    from ncsn.steps import toy

    result = dataclasses.asdict(toy.run(out or storage.join(DEFAULT_ROOT, "toy"), seed=seed))
    click.echo(json.dumps(result, indent=1) if as_json else describe_toy(result))
