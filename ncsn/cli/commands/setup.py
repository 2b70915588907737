"""The commands around the start of an experiment. Imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import json
import math
import sys
from typing import TYPE_CHECKING

import click

from ncsn.cli.options import ReportingCommand, experiment_options, json_option
from ncsn.errors import UserError

if TYPE_CHECKING:
    from ncsn.cli.target import Experiment


_MINUTES = 20.0  # of a run that `init` plans


@click.command("init", cls=ReportingCommand, short_help="Write a config for your own images.")
@click.argument("place", metavar="PLACE")
@click.option("--out", metavar="FILE", help="The file to write; default: NAME.yaml here. It must not exist.")
@click.option("--minutes", type=click.FloatRange(min=1), help=f"Target length of the run; default: {_MINUTES:.0f}.")
@click.option("--set", "overrides", metavar="A.B=VALUE", multiple=True, help="Set one value of the config; repeatable.")
@json_option
def init_command(
    *,
    place: str,
    out: str | None,
    minutes: float | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Look at the images in PLACE, choose every setting, and write a config that `ncsn run` takes.

    PLACE is a folder, an s3:// prefix, a .tar, .zip or .parquet file, or the name of an example, such as digits. The
    choices fit the images, this machine and the length of the run. Of many images it looks at a sample. The reasons
    are in the file, and a picture next to it shows what training will see.
    """
    from ncsn.tools import init

    if init.is_example(place):
        if given := "--set" if overrides else "--minutes" if minutes else "":
            raise UserError(given, "an example is copied as it is", hint="edit the copy, or pass --set to `ncsn run`")
        written = init.copy_example(place, out)
    else:
        seconds = 60 * (minutes or _MINUTES)
        if not seconds < math.inf:
            raise UserError("--minutes", "not a length of time", value=minutes)
        written = init.from_images(place, out, seconds=seconds, overrides=overrides, ask_mirrored=_ask_mirrored)
    if as_json:
        click.echo(json.dumps(written.to_json(), indent=1))
        return
    for word, text in written.lines:
        click.echo(f"{word:<9} {text}")


def _ask_mirrored() -> bool:
    """Ask, but only on a terminal."""
    asked = sys.stdin.isatty() and sys.stdout.isatty()
    return asked and click.confirm("Are mirrored images still realistic? (faces yes, text no)", default=False)


@click.command("plan", cls=ReportingCommand, short_help="Estimate what training and sampling will take.")
@experiment_options
@click.option(
    "--tflops",
    type=click.FloatRange(0, min_open=True),
    help="Predict for workers that achieve this many TFLOP/s each; 40 % of an H100's peak is 396.",
)
@click.option("--price-per-hour", type=click.FloatRange(0), help="Of all workers together, for the column money.")
@json_option
def plan_command(*, experiment: Experiment, tflops: float | None, price_per_hour: float | None, as_json: bool) -> None:
    """Estimate the time of training and sampling, and the memory of a worker, by a few steps on this machine."""
    from ncsn.cli.console import console_on
    from ncsn.cli.views import print_plan
    from ncsn.tools.plan import plan

    target = experiment.resolve()
    found = plan(target.config, target.run, tflops=tflops, price_per_hour=price_per_hour)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        print_plan(console_on(sys.stdout), found)
