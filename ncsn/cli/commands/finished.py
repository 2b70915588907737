"""The commands that work on a finished run. Imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import click

from ncsn.cli.catalogue import OWN, STEP_INFO
from ncsn.cli.options import (
    Decorated,
    ReportingCommand,
    backend_options,
    experiment_options,
    input_options,
    json_option,
    lease_option,
)
from ncsn.errors import UserError

if TYPE_CHECKING:
    from ncsn.cli.target import Experiment

N = TypeVar("N", int, float)

# Those of `ncsn.model.restoration.tasks`, which --help does not import.
TASKS, SOLVERS, METHODS = ("inpaint", "superres", "deblur"), ("heun", "2m"), ("covariance", "dps")
_MASK_HELP = "For inpaint: a picture that is white where a pixel is known, or all but a square in the middle."


def _run(step: str, experiment: Experiment, *, as_json: bool, **options: Any) -> None:
    """Run the command like a step, with its inputs and those of its settings that are given."""
    from ncsn.cli.execute import run_step

    info = STEP_INFO[step]
    given = {name: options.pop(name, None) for name in (*info.inputs, *info.on_demand, "lease")}
    settings = {name: value for name, value in options.items() if value is not None}
    target = experiment.resolve(checkpoint=given.get("checkpoint"))
    run_step(step, target, given=given, settings=settings, as_json=as_json)


def _numbers(option: str, text: str | None, kind: Callable[[str], N], *, example: str) -> list[N] | None:
    if text is None:
        return None
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise UserError(option, f"expected numbers with commas, such as {example}", value=text) from None


def _command(step: str, short_help: str) -> Callable[[Decorated], click.Command]:
    return click.command(step, cls=ReportingCommand, short_help=short_help, help=STEP_INFO[step].summary)


@_command("figures", "Draw figures of a finished run.")
@experiment_options
@input_options("figures")
@click.option(
    "--nfe", metavar="N,N,...", help="Evaluations per image in the curve of quality over NFE; default: 10,20,50,100."
)
@click.option("--num-images", type=int, help="Images for each of its points; default: 256.")
@click.option("--out", metavar="FOLDER", help="Folder or URI for the files; default: report in the run's folder.")
@json_option
def figures_command(*, nfe: str | None, **options: Any) -> None:
    """Draw a finished run."""
    _run("figures", nfe=_numbers("--nfe", nfe, int, example="10,20,50,100"), **options)


@click.command("ema", cls=ReportingCommand, short_help="Average the weights differently, after training.")
@experiment_options
@input_options("ema")
@click.option(
    "--relative-width",
    "widths",
    metavar="W,W,...",
    required=True,
    help="Widths of the averages, as shares of the training: 0.03 to 0.2.",
)
@click.option(
    "--at-images", type=click.IntRange(1), help="Images seen where the averages end; default: at the checkpoint."
)
@json_option
def ema_command(*, widths: str, **options: Any) -> None:
    """Compute averages of the weights of any relative width from the snapshots of train.ema.kind: power.

    `ncsn select` then finds the best of them; --set sampling.relative_width=W samples with one.
    """
    _run("ema", relative_widths=_numbers("--relative-width", widths, float, example="0.05,0.1"), **options)


@click.command("select", cls=ReportingCommand, short_help="Find the best checkpoint of a run by samples of each.")
@experiment_options
@input_options("select")
@click.option("--only-choose", is_flag=True, help="Stop after the choice.")
@lease_option
@backend_options
@json_option
def select_command(*, experiment: Experiment, only_choose: bool, as_json: bool, **given: str | None) -> None:
    """Score every kept checkpoint, and every average of `ncsn ema`, by a few samples; then use the best one.

    The section select of the config says how. The best one is sampled with sampling.seed, evaluated and registered.
    Training keeps checkpoints for this with train.keep_checkpoints=all or train.keep_every_images.
    """
    from ncsn.cli.execute import select_best

    only_choose = only_choose or given.get("lease") is not None  # the launcher does the rest
    select_best(experiment.resolve(), given=given, as_json=as_json, only_choose=only_choose)


@_command("likelihood", "Measure bits per dimension of test images.")
@experiment_options
@input_options("likelihood")
@click.option("--images", type=click.IntRange(1), help="Test images; default: evaluation.likelihood.images, or 1000.")
@json_option
def likelihood_command(**options: Any) -> None:
    """Measure the likelihood."""
    _run("likelihood", **options)


@_command("neon", "Improve a finished run by training on its own samples.")
@experiment_options
@backend_options
@lease_option
@input_options("neon")
@click.option("--samples", type=int, help="Samples to train on; default: 6000, at most as many as training images.")
@click.option(
    "--images", type=int, help="Length of training on them, in images; default: 6 % of the run's, at most 3,500,000."
)
@click.option("--multiples", metavar="W,W,...", help="Multiples w to try; default: 0.5,1,1.5,2,3.")
@click.option("--scored", type=int, help="Samples for the choice of w; default: 10000.")
@json_option
def neon_command(*, multiples: str | None, **options: Any) -> None:
    """Extrapolate a finished run."""
    _run("neon", multiples=_numbers("--multiples", multiples, float, example="0.5,1,2"), **options)


@_command("restore", "Restore incomplete, small or blurred images.")
@experiment_options
@input_options("restore")
@click.option("--dataset", metavar="URI", help="Dataset whose test images are degraded; default: the run's own.")
@click.option("--images", metavar="FOLDER", help="Folder of incomplete, small or blurred images to restore instead.")
@click.option("--task", type=click.Choice(TASKS), default="inpaint", show_default=True, help="What to restore.")
@click.option("--mask", metavar="FILE|box", default="box", show_default=True, help=_MASK_HELP)
@click.option(
    "--factor", type=int, default=4, show_default=True, help="For superres: how many times larger images become."
)
@click.option(
    "--blur-width",
    type=float,
    default=1.5,
    show_default=True,
    help="For deblur: standard deviation of the Gaussian kernel, in pixels.",
)
@click.option(
    "--sigma-y",
    type=float,
    default=0.0,
    show_default=True,
    help="Standard deviation of the noise; pixels are in [0, 1].",
)
@click.option("--steps", type=int, default=50, show_default=True, help="Number of noise levels to visit.")
@click.option("--solver", type=click.Choice(SOLVERS), default="heun", show_default=True, help="Method of integration.")
@click.option(
    "--method",
    type=click.Choice(METHODS),
    default="covariance",
    show_default=True,
    help="Guidance; dps needs 200 steps or more.",
)
@click.option("--label", metavar="CLASS", help="Class of all images; default: that of each test image, else none.")
@click.option(
    "--num-images", type=click.IntRange(1), help="How many images; default: 16 test images, or all of --images."
)
@click.option("--out", metavar="FOLDER", help="Folder or URI for the files; default: in the run's folder.")
@json_option
def restore_command(**options: Any) -> None:
    """Restore images."""
    if options["images"] is None:
        options["dataset"] = options["dataset"] or OWN
    elif options["dataset"] is not None:
        raise UserError("--dataset", "is for test images only", hint="leave out --images or --dataset")
    _run("restore", **options)
