"""The commands that draw. Their imports are inside, as in `ncsn.cli.app`."""

from __future__ import annotations

import dataclasses
import json

import click

from ncsn.cli.catalogue import BESIDE_THE_PIPELINE
from ncsn.cli.failures import ReportingCommand
from ncsn.cli.options import Decorated, experiment_options, json_option
from ncsn.errors import UserError


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
    from ncsn.tools import toy

    result = dataclasses.asdict(toy.run(out or storage.join(DEFAULT_ROOT, "toy"), seed=seed))
    click.echo(json.dumps(result, indent=1) if as_json else describe_toy(result))


def _input_options(step: str) -> Decorated:
    def decorate(command: Decorated) -> Decorated:
        for name, source in reversed(list(BESIDE_THE_PIPELINE[step].inputs.items())):
            command = click.option(f"--{name}", metavar="URI", help=f"The {source.what}; default: the run's own.")(
                command
            )
        return command

    return decorate


@click.command(
    "figures", cls=ReportingCommand, short_help="Draw a finished run.", help=BESIDE_THE_PIPELINE["figures"].summary
)
@experiment_options
@_input_options("figures")
@click.option("--nfe", metavar="N,N,...", help="Evaluations per image in the curve of quality over NFE.")
@click.option("--num-images", type=int, help="Images behind each of its points.")
@click.option("--out", metavar="FOLDER", help="Folder or URI for the files; default: report in the run's folder.")
@json_option
def figures_command(
    *,
    config_uri: str | None,
    overrides: tuple[str, ...],
    run_name: str | None,
    as_json: bool,
    nfe: str | None,
    num_images: int | None,
    out: str | None,
    **given: str | None,
) -> None:
    """Draw a finished run."""
    from ncsn.cli.commands import run_step
    from ncsn.cli.inputs import resolve

    target = resolve(config_uri, overrides=overrides, run=run_name, checkpoint=given.get("checkpoint"))
    chosen = {"nfe": _numbers("--nfe", nfe) if nfe else None, "num_images": num_images, "out": out}
    settings = {name: value for name, value in chosen.items() if value is not None}
    run_step("figures", target, given=given, settings=settings, as_json=as_json)


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(option, "expected whole numbers with commas, such as 10,20,50", value=text) from None
