"""The commands around the start of an experiment. Imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from ncsn.cli.options import ReportingCommand, experiment_options, json_option
from ncsn.errors import UserError

if TYPE_CHECKING:
    from ncsn.cli.target import Experiment, Target


_MINUTES = 20.0  # of a run that `init` plans


@click.command("init", cls=ReportingCommand, short_help="Write a config for your own images.")
@click.argument("place", metavar="PLACE")
@click.option("--out", metavar="FILE", help="The file to write; default: NAME.yaml here. It must not exist.")
@click.option("--minutes", type=click.FloatRange(min=1), help=f"Target length of the run; default: {_MINUTES:.0f}.")
@click.option("--hours", type=click.FloatRange(min=0.02), help="The same in hours.")
@click.option("--set", "overrides", metavar="A.B=VALUE", multiple=True, help="Set one value of the config; repeatable.")
@json_option
def init_command(
    *,
    place: str,
    out: str | None,
    minutes: float | None,
    hours: float | None,
    overrides: tuple[str, ...],
    as_json: bool,
) -> None:
    """Look at the images in PLACE, choose every setting, and write a config that `ncsn run` takes.

    PLACE is a folder, an s3:// prefix, a .tar, .zip or .parquet file, or the name of an example, such as digits. The
    choices fit the images, this machine and the length of the run. Of many images it looks at a sample. The reasons
    are in the file, and a picture next to it shows what training will see.
    """
    from ncsn.tools import init

    if minutes is not None and hours is not None:
        raise UserError("--hours", "given together with --minutes", hint="leave one out", value=hours)
    if init.is_example(place):
        if minutes is not None or hours is not None:
            raise UserError("--minutes", "an example has its own length", hint="use --set train.num_images=N")
        written = init.copy_example(place, out, overrides)
    else:
        seconds = 60 * (minutes or 60 * (hours or 0) or _MINUTES)
        if not seconds < math.inf:
            raise UserError("--minutes" if minutes else "--hours", "not a length of time", value=minutes or hours)
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


@click.command("plan", cls=ReportingCommand, short_help="Estimate what a run will take.")
@experiment_options
@click.option("--prices", "prices_uri", metavar="PATH|URI", help="A price table; default: the package's prices.yaml.")
@click.option("--actual", is_flag=True, help="Show what the run took next to its plan, without a trial run.")
@click.option(
    "--tflops",
    type=click.FloatRange(0, min_open=True),
    help="Predict training and sampling on workers that achieve this many TFLOP/s each, without a trial run. 40 % of "
    "an H100's peak is 396.",
)
@json_option
def plan_command(
    *, experiment: Experiment, prices_uri: str | None, actual: bool, tflops: float | None, as_json: bool
) -> None:
    """Estimate what a run will take: hours, memory, storage, money and energy of each step.

    It tries every step on a few images in a temporary store, which takes about a minute.
    """
    from ncsn.cli.console import console_on
    from ncsn.cli.views import print_account, print_plan, print_prediction

    if actual and tflops is not None:
        raise UserError("--tflops", "predicts, and --actual shows what a run took", hint="leave one of them out")
    target = experiment.resolve()
    if actual:
        from ncsn.runs.costs import account

        found = account(target.config, run=target.run)
    elif tflops is not None:
        found = _predicted(target, prices_uri, tflops)
    else:
        found = _estimated(target, prices_uri)
    if as_json:
        click.echo(json.dumps(found, indent=1))
    else:
        show = print_account if actual else print_plan if tflops is None else print_prediction
        show(console_on(sys.stdout), found)


def _predicted(target: Target, prices_uri: str | None, tflops: float) -> dict[str, Any]:
    from ncsn.runs.costs import load_prices
    from ncsn.tools.planning import predict
    from ncsn.tools.trial_run import settle

    return predict(settle(target.config), load_prices(prices_uri), tflops=tflops)


def _estimated(target: Target, prices_uri: str | None) -> dict[str, Any]:
    from ncsn.cli.console import quiet_libraries
    from ncsn.cli.execute import work_folder
    from ncsn.runs.costs import load_prices
    from ncsn.runs.folder import run_folder

    prices = load_prices(prices_uri)
    log = work_folder(run_folder(target.config, target.run)) / "plan.log"
    with quiet_libraries(log) as console:
        console.print(f"log    {log}\ntrial run", soft_wrap=True)
        from ncsn.tools import trial_run

        return trial_run.run(
            target.config, run=target.run, prices=prices, report=lambda part: console.print(f"       {part}")
        )


@click.command("suggest-noise", cls=ReportingCommand, short_help="Choose noise levels and a step size from the images.")
@click.option("--config", "config_uri", metavar="PATH|URI", help="The experiment whose images are compared.")
@click.option("--set", "overrides", metavar="A.B=VALUE", multiple=True, help="Change one value of the config.")
@click.option("--data", "dataset", metavar="URI", help="An ingested dataset to use instead.")
@click.option(
    "--mirrored", is_flag=True, help="Count mirrored images too; with --config, data.horizontal_flip decides."
)
@click.option("--sigma-L", "sigma_L", default=0.01, show_default=True, help="Smallest sigma, pixels in [0, 1].")
@click.option("--overlap", default=0.5, show_default=True, help="Overlap C of neighboring levels; published: 0.567.")
@click.option("--steps-per-level", default=5, show_default=True, type=click.IntRange(1), help="Langevin steps T.")
@json_option
def suggest_noise_command(
    *,
    config_uri: str | None,
    overrides: tuple[str, ...],
    dataset: str | None,
    mirrored: bool,
    as_json: bool,
    **levels: Any,
) -> None:
    """Print YAML for a config, by techniques 1, 2 and 4 of NCSNv2.

    sigma_1 is the largest distance between any two of up to 60,000 images. The ratio of neighboring levels makes them
    overlap by C. epsilon leaves the right variance after T steps. sigma_data is the spread of the pixels around
    mid-gray.
    """
    from ncsn.cli.target import Experiment
    from ncsn.cli.views import describe_suggestion
    from ncsn.tools import preparation

    if (config_uri is None) == (dataset is None):
        raise UserError("--config", "pass either this or --data", hint="--data takes the URI of an ingested dataset")
    if dataset is not None:
        sample = preparation.images_of_dataset(dataset)
    else:
        data = Experiment(config_uri, overrides).resolve().config.data
        sample, mirrored = preparation.images_of_source(data), mirrored or data.horizontal_flip
    found = preparation.suggest_levels(sample, mirrored=mirrored, **levels)
    sigma_data = preparation.spread_around_gray(sample)
    shown = asdict(found) | {"sigma_data": sigma_data}
    click.echo(json.dumps(shown, indent=1) if as_json else describe_suggestion(found, sigma_data=sigma_data))
